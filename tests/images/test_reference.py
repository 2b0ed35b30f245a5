"""Reference attention: off it is the plain U-Net; on, attention over both images' keys, as computed by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import denoising_loss
from diffrl.images.model import Lora
from diffrl.support.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffrl.images.models import load_model  # noqa: E402
from diffrl.images.models.pipelines import load_pipeline  # noqa: E402
from diffrl.images.models.reference import Bank, Reference, ReferenceAttention, reference_model  # noqa: E402
from tests.images.tiny import ROUNDINGS, save_ddpm, save_sd  # noqa: E402
from tests.rounding import assert_equal_to_rounding, rounding  # noqa: E402

SIZE = 32
PROMPTS = ["a cat", "a dog"]
ATTENTION = 32
"""Roundings: products, a softmax and sums of some 12, in a row."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("models") / "sd", size=SIZE)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def referring(folder: Path, lora: Lora | None = None, checkpointing: bool = False, **settings: Any) -> Reference:
    return reference_model(str(folder), lora=lora, checkpointing=checkpointing, **settings)


def test_the_processor_attends_to_both_images_keys() -> None:
    from diffusers.models.attention_processor import Attention

    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn = Attention(query_dim=12, heads=3, dim_head=4, processor=ReferenceAttention()).eval()
    x, x_ref = draws(2, 5, 12), draws(2, 7, 12, seed=1)
    bank = Bank()

    def heads(y: Tensor) -> Tensor:
        return y.reshape(2, -1, 3, 4).transpose(1, 2)

    with torch.no_grad():
        plain = attn(x_ref)
        assert_equal_to_rounding(attn(x_ref, bank=bank), plain, ATTENTION)
        ours = attn(x, bank=Bank(writing=False, stored=bank.stored))
        keys = torch.cat([heads(attn.to_k(x)), heads(attn.to_k(x_ref))], 2)
        values = torch.cat([heads(attn.to_v(x)), heads(attn.to_v(x_ref))], 2)
        weights = torch.softmax(heads(attn.to_q(x)) @ keys.transpose(2, 3) / 4**0.5, -1)
        by_hand = attn.to_out[0]((weights @ values).transpose(1, 2).reshape(2, 5, 12))
        assert_equal_to_rounding(ours, by_hand, ATTENTION)
        assert not torch.allclose(ours, attn(x), atol=1e-3)
        assert torch.equal(attn(x, encoder_hidden_states=x_ref, bank=bank), attn(x, encoder_hidden_states=x_ref))


def test_attention_to_a_reference_that_is_itself_is_plain() -> None:
    """Every key twice: the same weights, halved, on each."""
    from diffusers.models.attention_processor import Attention

    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=ReferenceAttention()).eval()
    x, bank = draws(1, 6, 8), Bank()
    with torch.no_grad():
        plain = attn(x, bank=bank)
        assert_equal_to_rounding(attn(x, bank=Bank(writing=False, stored=bank.stored)), plain, ATTENTION)


@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("lora", [None, Lora(2)])
def test_without_a_reference_it_is_the_plain_unet_bit_for_bit(folder: Path, guidance: float, lora: Lora | None) -> None:
    plain, model = load_pipeline(str(folder), lora=lora), referring(folder, lora)
    x, t = draws(2, *model.shape), torch.tensor([0.2, 2.0])
    with torch.no_grad():
        m = plain.network(plain.conditions(PROMPTS), guidance=guidance)(x, t)
        network = model.network(model.conditions(PROMPTS), guidance=guidance)
        assert torch.equal(network(x, t), m)
        condition = model.conditions(PROMPTS, {"reference": pictures(2)})
        referred = model.network(condition, guidance=guidance)(x, t)
        assert not torch.allclose(referred, m, atol=1e-4)
        assert torch.equal(network(x, t), m)  # nothing is left of it


@pytest.mark.parametrize("lora", [None, Lora(2)])
def test_a_reference_that_is_as_noisy_as_x_changes_nothing(folder: Path, lora: Lora | None) -> None:
    """Where the reference's pass is the denoising pass, all keys are there twice."""
    model = referring(folder, lora)
    condition = model.conditions(PROMPTS, {"reference": pictures(2)})
    t = torch.tensor(0.7)
    x = model.prediction.process.perturb(condition["reference"], t, condition["reference_noise"])
    with torch.no_grad():
        plain = model.network(model.conditions(PROMPTS))(x, t)
        assert_equal_to_rounding(model.network(condition)(x, t), plain, ROUNDINGS)
        assert not torch.allclose(model.network(condition)(x, t), model.network(condition)(x.flip(0), t), atol=1e-3)


def test_rows_have_their_own_reference_and_noise(folder: Path) -> None:
    model = referring(folder)
    images, x, t = pictures(2), draws(2, *model.shape), torch.tensor(0.5)
    both = model.conditions(PROMPTS, {"reference": images})
    one = model.conditions(PROMPTS[1:], {"reference": images[1:]})
    assert torch.equal(both["reference_noise"][1:], one["reference_noise"])
    assert not torch.equal(both["reference_noise"][0], both["reference_noise"][1])
    with torch.no_grad():
        assert_equal_to_rounding(model.network(both)(x, t)[1:], model.network(one)(x[1:], t), ROUNDINGS)
    clean = referring(folder, noised=False, scale=5.0).conditions(PROMPTS, {"reference": images})
    assert_equal_to_rounding(clean["reference"], 5 * both["reference"], ROUNDINGS)
    assert not clean["reference_noise"].any()


@pytest.mark.long
@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_supervised_steps_lower_the_loss_through_both_passes(folder: Path, noised: bool, lora: Lora | None) -> None:
    model = referring(folder, lora, noised=noised)
    images = pictures(4)
    x0, condition = model.encode(images), model.conditions(["a"] * 4, {"reference": images.flip(3)})
    generator = torch.Generator().manual_seed(0)
    t, noise = model.training_times(4, generator), torch.randn(x0.shape, generator=generator)

    def loss(reference: bool = False) -> Tensor:
        network = model.network(condition, reference=reference)
        return denoising_loss(model.prediction, network, x0, t, noise, event_dims=3).mean()

    frozen, values = loss(reference=True), []
    optimiser = torch.optim.AdamW(model.tuned.parameters().values(), 1e-3 if lora is None else 1e-2)
    for _ in range(6):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[0] == pytest.approx(frozen.item(), rel=rounding(torch.float32, ROUNDINGS))
    assert values[-1] < values[0]
    assert torch.equal(loss(reference=True), frozen)


def test_gradient_checkpointing_has_the_same_gradients(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = referring(folder, checkpointing=checkpointing)
        assert model.tuned.network.is_gradient_checkpointing == checkpointing
        condition = model.conditions(PROMPTS, {"reference": pictures(2)})
        model.network(condition)(draws(2, *model.shape), torch.tensor(0.5)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.tuned.parameters().items()})
    for name, gradient in gradients[0].items():
        assert_equal_to_rounding(gradient, gradients[1][name], ROUNDINGS)


def test_half_precision_is_near(folder: Path) -> None:
    answers = []
    for precision in ("fp32", "bf16"):
        model = reference_model(str(folder), lora=Lora(2), precision=precision)
        condition = model.conditions(PROMPTS, {"reference": pictures(2)})
        with torch.no_grad():
            answers.append(model.network(condition)(draws(2, *model.shape), torch.tensor(0.5)).float())
    assert (answers[0] - answers[1]).abs().max() < 0.1 * answers[0].std()
    assert not torch.equal(*answers)


def test_saved_it_loads_as_its_base_does(folder: Path, tmp_path: Path) -> None:
    model = referring(folder, Lora(2))
    with torch.no_grad():
        for name, parameter in model.tuned.parameters().items():
            parameter += 0.1 * draws(*parameter.shape, seed=len(name))
    model.save(tmp_path)
    loaded = load_model(f"reference:{folder}", lora=None, adapter=tmp_path)
    x, t, extras = draws(2, *model.shape), torch.tensor(0.5), {"reference": pictures(2)}
    with torch.no_grad():
        m = model.network(model.conditions(PROMPTS, extras))(x, t)
        assert_equal_to_rounding(loaded.network(loaded.conditions(PROMPTS, extras))(x, t), m, ROUNDINGS)


def test_what_it_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    model = referring(folder)
    with pytest.raises(UserError, match="scale them to the size of its images"):
        model.conditions(PROMPTS, {"reference": torch.zeros(2, 3, 16, 16)})
    with pytest.raises(UserError, match="no use for control"):
        model.conditions(PROMPTS, {"control": pictures(2)})
    with pytest.raises(UserError, match="has no U-Net with cross-attention"):
        Reference(load_pipeline(str(save_ddpm(tmp_path / "ddpm")), lora=None))
