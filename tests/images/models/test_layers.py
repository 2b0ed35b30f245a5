"""`--layers`: the layers that are named are trained as in the whole network, and nothing else is touched."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffrl.images.model import Lora
from diffrl.images.models import load_model
from diffrl.images.models.pipelines import PipelineModel
from diffrl.support.errors import UserError
from tests.images.models.pipeline_cases import PROMPTS, diffusers_pipeline, noise, ours, stir, theirs
from tests.images.tiny import ROUNDINGS
from tests.rounding import assert_equal_to_rounding

TIME = ("time_embedding", "time_emb_proj")
LAYERS = {"sd": TIME, "ddpm": TIME, "sd3": ("time_text_embed", "norm1.linear")}


def loaded(folder: Path, lora: Lora | None = None, layers: tuple[str, ...] = (), **options: object) -> PipelineModel:
    model = load_model(str(folder), lora=lora, layers=layers, **options)
    assert isinstance(model, PipelineModel)
    return model


def expected_names(network: nn.Module, layers: tuple[str, ...]) -> set[str]:
    """The parameters of the layers so named, found from the layers down."""
    named = [
        (name, layer) for name, layer in network.named_modules() if f".{name}".endswith(tuple(f".{n}" for n in layers))
    ]
    return {f"{name}.{inner}" for name, layer in named for inner, _ in layer.named_parameters()}


def output(model: PipelineModel, *, reference: bool = False) -> Tensor:
    prompts = PROMPTS if hasattr(model.pipeline, "tokenizer") else ["", ""]
    x, t = noise(model, 2), model.times(4)[1]
    return model.network(model.conditions(prompts), reference=reference)(x, t)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_have_the_gradients_of_the_whole_network_and_the_others_none(
    kind: str, folders: dict[str, Path]
) -> None:
    whole, part = loaded(folders[kind]), loaded(folders[kind], layers=LAYERS[kind])
    names = expected_names(whole.tuned.network, LAYERS[kind])
    assert set(part.tuned.parameters()) == names
    assert 0 < len(names) < len(whole.tuned.parameters())
    for model in (whole, part):
        output(model).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in whole.tuned.network.named_parameters()}
    for name, parameter in part.tuned.network.named_parameters():
        if name in names:
            assert_equal_to_rounding(parameter.grad, gradients[name], ROUNDINGS)
        else:
            assert parameter.grad is None


def test_all_is_every_layer_that_can_have_an_adapter(folders: dict[str, Path]) -> None:
    every = loaded(folders["ddpm"], lora=Lora(2, targets=("all",), named=True)).tuned
    bare = loaded(folders["ddpm"]).tuned.network
    names = {name for name, layer in bare.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert {name.partition(".lora_")[0] for name in every.parameters()} == names
    assert len(names) > len(loaded(folders["ddpm"], lora=Lora(2)).tuned.parameters()) / 2
    whole = loaded(folders["ddpm"], layers=("all",)).tuned
    assert set(whole.parameters()) == set(loaded(folders["ddpm"]).tuned.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_reference_stays_and_has_no_copies_of_what_is_frozen(kind: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[kind], layers=LAYERS[kind])
    before = output(model).detach()
    assert torch.equal(output(model, reference=True), before)
    copied = model.tuned._copy
    assert copied is not None
    trained = model.tuned.parameters()
    for (name, one), (_, other) in zip(model.tuned.network.named_parameters(), copied.named_parameters(), strict=True):
        assert (one.data_ptr() == other.data_ptr()) == (name not in trained)
    stir(model)
    assert torch.equal(output(model, reference=True), before)
    assert not torch.allclose(output(model), before, atol=1e-3)


def test_adapters_go_to_the_layers_named_and_load_in_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["sd"], Lora(2, targets=TIME))
    stir(model)
    adapted = {name.split(".lora_")[0] for name in model.tuned.parameters()}
    plain = diffusers_pipeline(folders["sd"])
    names = {name for name in expected_names(plain.unet, TIME) if name.endswith("weight")}
    assert adapted == {name.removesuffix(".weight") for name in names}
    model.save(tmp_path)
    x = noise(model, 2)
    untrained = theirs(plain, x)
    plain.load_lora_weights(tmp_path)
    assert_equal_to_rounding(ours(model, x), theirs(plain, x), ROUNDINGS)
    assert not torch.allclose(theirs(plain, x), untrained, atol=1e-3)
    again = loaded(folders["sd"], adapter=tmp_path)
    assert torch.equal(ours(again, x), ours(model, x))


WRONG = {
    "nearly": (("conv_out", "time_embeding"), None, "ends in time_embeding: did you mean time_embedding?"),
    "not at all": (("zz",), None, "names end in attentions, attn1, attn2, conv, "),
    "a part of a word": (("ime_embedding",), None, "did you mean time_embedding?"),
    "without weights": (("dropout",), None, "dropout of UNet2DConditionModel has no weights."),
    "near one without weights": (("time_prj",), None, "did you mean time_emb_proj?"),
    "one adapter of two": (("time_embedding", "time_emb_prj"), Lora, "did you mean time_emb_proj?"),
    "no adapters there": (
        ("norm1",),
        Lora,
        "norm1 of UNet2DConditionModel takes no adapters: Linear and Conv2d layers do.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layer_that_cannot_be_trained_is_named(case: str, folders: dict[str, Path]) -> None:
    """What is meant is said, and is a layer that would do."""
    layers, kind, said = WRONG[case]
    with pytest.raises(UserError, match=r"^--layers: ") as caught:
        loaded(
            folders["sd"],
            *((Lora(2, targets=layers, named=True),) if kind else ()),
            **({} if kind else {"layers": layers}),
        )
    assert said in str(caught.value)


def test_parts_of_a_trained_branch_are_trained_and_of_a_new_one_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="needs --adapter, a trained branch"):
        load_model(f"control:{folders['sd']}", lora=None, layers=TIME)
    whole = load_model(f"control:{folders['sd']}", lora=None)
    for parameter in whole.tuned.parameters().values():
        parameter.data.add_(0.1)
    whole.save(tmp_path)
    model = load_model(f"control:{folders['sd']}", lora=None, adapter=tmp_path, layers=TIME)
    assert set(model.tuned.parameters()) == expected_names(model.tuned.network, TIME)
    x, t = torch.randn(2, *model.shape), model.times(4)[1]
    condition = model.conditions(PROMPTS, {"control": torch.rand(2, 3, 32, 32)})
    model.network(condition)(x, t).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.tuned.parameters().values())
