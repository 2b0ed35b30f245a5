"""Distillation of image models: maps and losses against closed forms of a Gaussian, and runs of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

import diffrl
from agents import DiffusionBC
from diffrl.commands.compare import Compare
from diffrl.commands.distil import _of_images
from diffrl.commands.distil import run as command
from diffrl.diffusion import VP, Network, Prediction
from diffrl.diffusion.prediction import Kind
from diffrl.images import distil_job
from diffrl.images.algorithms.base import Finetuner
from diffrl.images.config import FinetuneConfig
from diffrl.images.config.base import base_of
from diffrl.images.distil import DistilLearner, Pairs, anchored, learned, teach
from diffrl.images.distil_config import ImageDistilConfig
from diffrl.images.job import finetune
from diffrl.images.model import Condition
from diffrl.images.models import load_model
from diffrl.images.models.emoji import EmojiModel
from diffrl.images.run import plain
from diffrl.runs.run import Run
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.support.files import read_yaml
from tests.images.toy import STD, Toy
from tests.runs.made_runs import made_run
from tests.training.conftest import final_state

EPS = torch.finfo(torch.float32).eps
LEVELS = 6
SMALL = {"pairs": 12, "levels": 4, "batch_size": 4, "eval_samples": 20}
Function = Callable[[Tensor, Tensor], Tensor]


class Known(Toy):
    """The toy, whose teacher is exact for N(0, STD^2), beside a student that is the given function of x and t."""

    def __init__(self, student: Function) -> None:
        super().__init__()
        self.student = student

    @override
    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        return super().network(condition, reference=True) if reference else self.student


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None] if values.ndim else values


def factors(times: Tensor) -> Tensor:
    """What DDIM multiplies x by from each of the times down to 0, for the exact denoiser of N(0, STD^2): (T + 1,).

    In y = x / a, dy/dk = (y - D) / k with D = y STD^2 / (STD^2 + k^2) is dy/dk = y k / (STD^2 + k^2), by Euler's step.
    """
    t = times.double()
    k, a = VP().ratio(t), VP().alpha(t)
    steps = 1 + (k[1:] - k[:-1]) * k[:-1] / (STD**2 + k[:-1] ** 2)
    return torch.cat([steps.flip(0).cumprod(0).flip(0), steps.new_ones(1)]) / a


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_consistency_function_is_the_identity_without_noise_and_else_the_denoiser(kind: Kind) -> None:
    """f(x, 0) = x to the bit, row by row, whatever the network says; the boundary condition."""
    prediction = Prediction(kind, VP())
    denoise = prediction.denoiser(lambda x, t: 3 * x.cos() + column(t))
    x, t = noise(4, 2, 3, 3), torch.tensor([0.0, 0.3, 0.0, 1.5])
    got = anchored(denoise)(x, t)
    assert torch.equal(got[[0, 2]], x[[0, 2]])
    assert torch.equal(got[[1, 3]], denoise(x, t)[[1, 3]])
    assert not torch.equal(got[1], x[1])


@pytest.mark.parametrize("calls", [1, 3, LEVELS])
def test_a_gaussian_teachers_map_is_the_product_of_its_steps(calls: int) -> None:
    model, z = Toy(), noise(5, 1, 1, 1)
    start = float(VP().sigma(model.times(calls)[0]))
    got = teach(model, model.conditions(["a"] * 5), z, calls)
    want = start * z * float(factors(model.times(calls))[0])
    torch.testing.assert_close(got, want, rtol=64 * calls * EPS, atol=0)


def test_a_gaussian_teacher_in_many_calls_is_the_odes_own_map() -> None:
    """x_0 = STD z sqrt(...): y shrinks by sqrt(STD^2 + k^2) along the path. Euler's error is of first order."""

    class Fine(Toy):
        @override
        def times(self, steps: int) -> Tensor:
            return VP().grid(steps, 0.002, 20, to_zero=True)

    model, z = Fine(), noise(5, 1, 1, 1)
    t = model.times(2)[0].double()
    exact = STD * z * float(VP().sigma(t) / VP().alpha(t) / (STD**2 + VP().ratio(t) ** 2).sqrt())
    errors = [
        float((teach(model, model.conditions(["a"] * 5), z, calls) - exact).abs().max()) for calls in (50, 100, 200)
    ]
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


def test_cd_is_zero_at_the_teachers_own_end_and_nowhere_near_it() -> None:
    """The student that multiplies x by all of the teacher's steps that are left; sampled, it is the teacher's map."""
    times = Toy().times(LEVELS)
    whole = factors(times).float()

    def exact(scale: float) -> Function:
        def student(x: Tensor, t: Tensor) -> Tensor:
            i = (times[:, None] - t.reshape(1, -1)).abs().argmin(0)
            factor = whole[i] * torch.where(i == 0, scale, 1.0)
            return x * (column(factor) if t.ndim else factor[0])

        return student

    config = ImageDistilConfig(teacher="x", levels=LEVELS)
    i, x0, e = torch.arange(LEVELS), STD * noise(LEVELS, 1, 1, 1), noise(LEVELS, 1, 1, 1, seed=1)
    losses = []
    for scale in (1.0, 1.1, -1.0):
        model = Known(exact(scale))
        learner = DistilLearner(model, model.conditions(["a"] * LEVELS), config)
        losses.append(learner.cd_loss(model.conditions(["a"] * LEVELS), x0, i, e))
    assert float(losses[0].max()) <= (256 * EPS) ** 2
    for loss in losses[1:]:
        assert float(loss[1:].max()) <= (256 * EPS) ** 2
        assert float(loss[0]) > 1e-5
    model, z = Known(exact(1.0)), noise(1, 3, 1, 1, 1)
    condition = model.conditions(["a"] * 3)
    got, want = learned(model, condition, z, 1, "consistency"), teach(model, condition, z[0], LEVELS)
    torch.testing.assert_close(got, want, rtol=128 * LEVELS * EPS, atol=0)


def test_reflow_is_zero_at_the_straight_flow_whose_every_number_of_calls_is_the_teachers_end() -> None:
    """On pairs x_0 = c z the line through x_t is known: D = c x_t / (a c + s)."""

    class Far(Known):
        """Sampling begins at next to no signal, as the built-in models' does."""

        @override
        def times(self, steps: int) -> Tensor:
            return VP().grid(steps, 0.1, 1e6, to_zero=True)

    times = Far(lambda x, t: x).times(LEVELS)
    c = float(factors(times)[0] * VP().sigma(times[0].double()))

    def straight(x: Tensor, t: Tensor) -> Tensor:
        return c * x / (column(VP().alpha(t)) * c + column(VP().sigma(t)))

    model, z = Far(straight), noise(4, 1, 1, 1)
    condition = model.conditions(["a"] * 4)
    learner = DistilLearner(model, condition, ImageDistilConfig(teacher="x", to="reflow", levels=LEVELS))
    x0, t = teach(model, condition, z, LEVELS), torch.tensor([0.1, 0.5, 1.0, float(times[0])])
    assert float(learner.reflow_loss(condition, x0, t, z).max()) <= (256 * EPS) ** 2
    assert float(learner.reflow_loss(condition, -x0, t, z).min()) > 1e-3
    for calls in (1, 2, 5):
        got = learned(model, condition, z[None], calls, "reflow")
        torch.testing.assert_close(got, x0, rtol=128 * calls * EPS, atol=0)


def test_half_of_a_batch_begins_at_pure_noise_where_one_call_is_asked_for() -> None:
    for calls, share in ((1, 4), (2, 0)):
        model = Toy()
        learner = DistilLearner(
            model, model.conditions(["a"]), ImageDistilConfig(teacher="x", to="reflow", calls=calls)
        )
        t = learner._reflow_times(8, torch.Generator().manual_seed(0))
        assert int((t == model.times(2)[0]).sum()) == share


def test_an_update_is_adams_step_and_the_average_follows_it() -> None:
    """Against torch's own Adam on the loss written out, and average + rate (trained - average)."""
    model, plain = Toy(), Toy()
    config = ImageDistilConfig(teacher="x", to="reflow", calls=2, learning_rate=0.1, ema_rate=0.25, grad_clip=0)
    learner = DistilLearner(model, model.conditions(["a"]), config)
    adam, average = torch.optim.Adam(plain.tuned.parameters().values(), 0.1), torch.zeros(())
    for step in range(3):
        batch = Pairs(1 + noise(1, 6, 1, 1, 1, seed=step), noise(1, 6, 1, 1, 1, seed=9), torch.zeros(1, 6).long())
        learner.update(batch, torch.Generator().manual_seed(step))
        t = plain.training_times(6, torch.Generator().manual_seed(step))
        x_t = column(VP().alpha(t)) * batch.x0[0] + column(VP().sigma(t)) * batch.noise[0]
        loss = (plain.network({})(x_t, t) - batch.x0[0]).square().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        average = average + 0.25 * (torch.tensor(plain.mean) - average)
    assert model.mean > 0
    assert model.mean == pytest.approx(plain.mean, rel=64 * EPS)
    assert float(learner.average["m"]) == pytest.approx(float(average), rel=64 * EPS)


@pytest.mark.long
@pytest.mark.parametrize("to", ["consistency", pytest.param("reflow", marks=pytest.mark.slow)])
def test_a_run_that_is_cut_goes_on_bit_for_bit_and_is_a_model_like_any_other(quick: Path, to: Any) -> None:
    def made(out: str, steps: int) -> Path:
        config = ImageDistilConfig(teacher="tiny-digits", to=to, steps=steps, **SMALL)
        return distil_job.distil(config, out=Path(out), quiet=True)

    whole, cut = made("whole", 4), made("cut", 2)
    diffrl.resume(cut, steps=4, quiet=True)
    one, other = final_state(whole), final_state(cut)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    rows = [json.loads((path / distil_job.RESULT).read_text())["rows"] for path in (whole, cut)]
    assert rows[0] == rows[1]
    found = [(row["who"], row["calls"]) for row in rows[0]]
    assert found == [(who, calls) for who in ("teacher", "student") for calls in (1, 2, 4)]
    assert rows[0][2]["distance"] == 0
    assert (whole / distil_job.PICTURE).is_file()
    student, teacher = load_model(str(whole), lora=None), load_model("tiny-digits", lora=None)
    for name, parameter in student.tuned.parameters().items():
        assert torch.equal(parameter, one[f"learner.average.{name}"])
        assert not torch.equal(parameter, teacher.tuned.parameters()[name])
    config = FinetuneConfig(
        model=str(whole), reward="jpeg", queries=8, batch=8, steps=2, updates=1, eval_samples=4, out=Path("tuned")
    )
    assert base_of(str(whole)) == "tiny-digits"
    assert config.lora == 0
    asked = FinetuneConfig(model=str(whole / "model"), reward="png")  # sampled as it was made to be
    straight = to == "reflow"
    assert (asked.algo, asked.steps, asked.eta) == ("nft" if straight else "ddpo-is", 2, 0 if straight else 1)
    assert FinetuneConfig(model=str(whole), steps=7, eta=0.5, algo="ddpo-is").steps == 7
    assert FinetuneConfig(model="tiny-digits", reward="png").steps == 10
    if straight:
        with pytest.raises(UserError, match="is sampled without noise; ddpo-is cannot learn from it: give more --eta"):
            FinetuneConfig(model=str(whole), algo="ddpo-is")
    history = json.loads((finetune(config, quiet=True) / "evaluations.json").read_text())
    assert "class_accuracy" in history[0]
    with pytest.raises(UserError, match="has 4 steps already"):
        diffrl.resume(whole, steps=2, quiet=True)
    before = (whole / distil_job.PICTURE).stat().st_mtime_ns
    assert diffrl.resume(whole, quiet=True) == whole  # all are done: nothing is made again
    assert (whole / distil_job.PICTURE).stat().st_mtime_ns == before
    assert read_yaml(whole / "settings.yaml")["steps"] == 4  # what was refused is not kept
    (whole / "model" / "model_index.json").rename("index")
    with pytest.raises(UserError, match="has no model yet: `diffrl resume"):
        load_model(str(whole), lora=None)
    with pytest.raises(UserError, match="is a distilled image model"):
        Run.read(whole)
    with pytest.raises(UserError, match="compares it with its teacher"):
        Compare((whole, Path("tuned"))).run()
    with pytest.raises(UserError, match="is distilled already"):
        distil_job.distil(ImageDistilConfig(teacher=str(whole)), out=Path("again"), quiet=True)


@pytest.mark.long
def test_what_a_run_on_tiny_emoji_trained_is_its_teacher(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command; the student is one of blocks' coefficients, with prompts of words."""
    tuned = FinetuneConfig(queries=8, batch=8, updates=1, steps=2, eval_samples=4, warm_up=0, out=Path("tuned"))
    finetune(tuned, quiet=True)
    words = "tuned --to reflow --calls 2 --steps 1 --pairs 2 --levels 2 --batch-size 2 --eval-samples 4 --out student"
    assert command(words.split()) == 0
    said = capsys.readouterr().err
    assert "agreement with prompts" in said
    assert "no checksums" not in said
    teacher, student = (load_model(f"student/{part}", lora=None) for part in ("teacher", "model"))
    mine, shipped = load_model("tuned/model", lora=None), load_model("tiny-emoji", lora=None)
    assert isinstance(student, EmojiModel)
    own = [model.tuned.state_dict()["conv_in.weight"] for model in (teacher, mine, shipped)]
    assert torch.equal(own[0], own[1])
    assert not torch.equal(own[0], own[2])
    assert base_of("student") == base_of("tuned") == base_of("tuned/model") == "tiny-emoji"
    plain, own = (
        FinetuneConfig(model="tiny-emoji"),
        FinetuneConfig(model="tuned", out=Path("further"), queries=8, batch=8, eval_samples=4),
    )
    assert (own.lora, own.steps, own.guidance) == (plain.lora, plain.steps, plain.guidance)
    about = folder.read_json(Path("tuned/run.json"))
    folder.write_json(Path("tuned/run.json"), {name: value for name, value in about.items() if name != "base"})
    assert base_of("tuned") == "tiny-emoji"  # of a run from before that was written
    assert "class_accuracy" in json.loads((finetune(own, quiet=True) / "evaluations.json").read_text())[-1]
    assert base_of("further") == "tiny-emoji"
    assert student.decode(torch.zeros(1, *student.shape)).shape == (1, 3, 32, 32)


def test_pairs_and_comparison_are_of_a_size_that_fits_the_updates(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No more pairs than the updates draw; the default sizes of a long run; and what is asked for, always.

    A run keeps them when it is made longer: it goes on with the pairs that it has, and says so.
    """
    for steps, sizes in ((1, (32, 84)), (100, (2520, 100)), (1500, (2520, 420))):
        config = ImageDistilConfig(teacher="tiny-emoji", steps=steps)
        assert (config.n_pairs, config.n_compared) == sizes
    asked = ImageDistilConfig(teacher="tiny-emoji", steps=1, pairs=7, eval_samples=9)
    assert (asked.n_pairs, asked.n_compared) == (7, 9)
    small: dict[str, Any] = {"levels": 2, "batch_size": 2, "eval_samples": 4}
    path = distil_job.distil(ImageDistilConfig(teacher="tiny-digits", steps=1, **small), out=Path("run"), quiet=True)
    assert len(folder.read_tensors(path / distil_job.PAIRS)["x0"]) == 2
    for steps, said in ((3, "the 2 pairs that it has: a new run of 3 steps makes 6, unless --pairs"), (None, "")):
        capsys.readouterr()
        assert diffrl.resume(path, steps=steps) == path
        told = " ".join(capsys.readouterr().err.split())
        assert said in told
        assert ("pairs that it has" in told) == (steps is not None)
        assert ImageDistilConfig.from_dict(read_yaml(path / "settings.yaml"), "x").n_pairs == 2


def test_a_run_that_is_to_end_sooner_says_so_and_has_its_pairs(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made for 3 updates and cut before the first: it ends at 2, with the pairs of 3, of which nothing is said."""
    config = ImageDistilConfig(teacher="tiny-digits", steps=3, levels=2, batch_size=2, eval_samples=4)
    with monkeypatch.context() as patched:
        patched.setattr(distil_job, "_train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distil_job.distil(config, out=Path("run"), quiet=True)
    diffrl.resume(Path("run"), steps=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "run was made for 3 steps, and is to end at 2 now" in told
    assert "pairs that it has" not in told
    assert len(folder.read_tensors(Path("run") / distil_job.PAIRS)["x0"]) == 6


@pytest.mark.parametrize(
    ("words", "of_images"),
    [
        ("tiny-emoji --steps 2", True),
        ("--to reflow tiny-emoji --steps 2", True),
        ("--steps=2 tiny-digits", True),
        ("runs/policy --out tiny-policy", False),
        ("--out tiny-policy runs/policy", False),
        ("--help tiny-emoji", True),
    ],
)
def test_what_is_distilled_is_told_by_the_word_that_is_no_options_value(words: str, of_images: bool) -> None:
    assert _of_images(words.split()) is of_images


def test_a_folder_that_is_called_as_a_built_in_model_is_not_it(quick: Path) -> None:
    """The name is the model; ./NAME the folder."""
    made_run(Path("tiny-emoji"), DiffusionBC(width=8))
    assert _of_images(["tiny-emoji"])
    assert not _of_images(["./tiny-emoji"])
    assert FinetuneConfig(model="tiny-emoji") == FinetuneConfig(algo="ddpo-is")
    assert plain(FinetuneConfig(), Path("a"))["model"] == "tiny-emoji"
    assert ImageDistilConfig(teacher="tiny-emoji").to_dict()["teacher"] == "tiny-emoji"
    assert load_model("tiny-emoji", lora=None).name == "tiny-emoji"
    words = "tiny-emoji --steps 1 --pairs 2 --levels 2 --batch-size 2 --eval-samples 4 --out student"
    assert command(words.split()) == 0
    assert base_of("student") == "tiny-emoji"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["finetune", "distil"])
def test_a_run_that_is_made_longer_and_cut_has_no_older_model(
    quick: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would be taken for the longer run's; until it is there, the run says so."""
    small: dict[str, Any] = {"queries": 8, "batch": 8, "updates": 1, "steps": 2, "eval_samples": 4, "reward": "jpeg"}
    if kind == "finetune":
        path = finetune(FinetuneConfig(model="tiny-digits", out=Path("run"), **small), quiet=True)
    else:
        path = distil_job.distil(
            ImageDistilConfig(teacher="tiny-digits", steps=1, **SMALL), out=Path("run"), quiet=True
        )
    old = load_model(str(path), lora=None).tuned.state_dict()

    def cut(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Finetuner, "advance", cut)
        patched.setattr(DistilLearner, "update", cut)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            diffrl.resume(path, steps=16 if kind == "finetune" else 2, quiet=True)
    with pytest.raises(UserError, match="run has no model yet: `diffrl resume run` finishes"):
        load_model(str(path), lora=None)
    assert not (path / distil_job.PICTURE).exists()
    diffrl.resume(path, quiet=True)
    new = load_model(str(path), lora=None).tuned.state_dict()
    assert any(not torch.equal(new[name], old[name]) for name in old)
    assert not list(path.glob(".model*"))


def test_a_run_that_cannot_go_on_keeps_its_model(quick: Path) -> None:
    """All its checkpoints are damaged: the student, its table and its picture could not be made again."""
    path = distil_job.distil(ImageDistilConfig(teacher="tiny-digits", steps=1, **SMALL), out=Path("run"), quiet=True)
    made = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "checkpoints" not in file.parts}
    for file in (path / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="no usable checkpoint"):
        diffrl.resume(path, steps=2, quiet=True)
    student = [path / distil_job.RESULT, path / distil_job.PICTURE, *(f for f in made if "model" in f.parts)]
    assert len(student) > 4
    assert all(file.read_bytes() == made[file] for file in student)


def test_a_run_of_other_weights_of_tiny_emoji_does_not_go_on(quick: Path) -> None:
    """The package's weights were changed, and what they predict: an older run's checkpoint does not fit them."""
    small: dict[str, Any] = {"queries": 8, "batch": 8, "updates": 1, "steps": 2, "eval_samples": 4}
    path = finetune(FinetuneConfig(out=Path("run"), **small), quiet=True)
    before = (path / "finetune.yaml").read_bytes()
    about = folder.read_json(path / "run.json")
    folder.write_json(path / "run.json", {name: value for name, value in about.items() if name != "weights"})
    with pytest.raises(UserError, match="began with other weights of tiny-emoji"):
        diffrl.resume(path, steps=16, quiet=True)
    assert (path / "finetune.yaml").read_bytes() == before
    folder.write_json(path / "run.json", about)
    diffrl.resume(path, steps=16, quiet=True)


def test_what_cannot_be_distilled_is_said_in_a_line(quick: Path) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(UserError) as raised:
            command([*words, "--out", "a"])
        assert not Path("a").exists()
        return str(raised.value)

    assert "tiny-latents cannot be distilled: expected tiny-emoji, tiny-digits" in refused("tiny-latents")
    near = "tiny-emoj cannot be distilled: did you mean 'tiny-emoji'? expected tiny-emoji, tiny-digits"
    assert near in refused("tiny-emoj")
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").write_text("{}")
    assert "Diffusers pipelines of your own are not supported" in refused("pipeline")
    load_model("tiny-digits", lora=None)
    small: dict[str, Any] = {"queries": 8, "batch": 8, "updates": 1, "steps": 2, "eval_samples": 4, "reward": "jpeg"}
    finetune(FinetuneConfig(model="tiny-digits", lora=1, out=Path("adapted"), **small), quiet=True)
    assert "trained adapters (--lora)" in refused("adapted")
    assert "levels is 1" in refused("tiny-digits", "--levels", "1").replace("--", "")
    Path("cut").mkdir()
    for file in ("run.json", "finetune.yaml"):
        Path("cut", file).write_bytes(Path("adapted", file).read_bytes().replace(b"lora: 1", b"lora: 0"))
    assert "has no model yet" in refused("cut")
