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
    named = [(name, layer) for name, layer in network.named_modules() if name.endswith(layers)]
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


@pytest.mark.parametrize(
    ("layers", "said"), [(("conv_out", "time_embeding"), "mean time_embedding?"), (("zz",), "to_q")]
)
def test_a_layer_that_is_not_there_is_named(layers: tuple[str, ...], said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"no layer whose name ends in {layers[-1]}") as caught:
        loaded(folders["sd"], layers=layers)
    assert said in str(caught.value)
    with pytest.raises(UserError, match="nothing to adapt"):
        loaded(folders["sd"], Lora(2, targets=layers[-1:]))
