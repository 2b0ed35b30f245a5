import pytest
import torch
from torch import Tensor

from diffrl.images.rewards import Sum, ask, ask_parts, parse
from diffrl.support.errors import UserError

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["1", "2", "3"]


def test_a_sum_is_its_parts_with_their_weights() -> None:
    reward = parse("2*jpeg + digit + -0.5*digit:8")
    jpeg, digit, eight = (ask(parse(name), IMAGES, PROMPTS) for name in ("jpeg", "digit", "digit:8"))
    total, parts = ask_parts(reward, IMAGES, PROMPTS)
    torch.testing.assert_close(total, 2 * jpeg + digit - 0.5 * eight)
    torch.testing.assert_close(ask(reward, IMAGES, PROMPTS), total)
    assert reward.name == "2*jpeg + digit + -0.5*digit:8"
    assert list(parts) == ["jpeg", "digit", "digit:8"]
    assert torch.equal(parts["digit:8"], eight), "parts are without their weights"


def test_one_reward_is_itself() -> None:
    reward = parse(" jpeg ")
    assert not isinstance(reward, Sum)
    total, parts = ask_parts(reward, IMAGES, PROMPTS)
    assert list(parts) == ["jpeg"]
    assert torch.equal(parts["jpeg"], total)
    assert torch.equal(ask(parse("-1*jpeg"), IMAGES, PROMPTS), ask(parse("incompressible"), IMAGES, PROMPTS))


def test_a_sum_is_differentiable_where_all_of_it_is() -> None:
    assert not parse("jpeg + digit").differentiable
    reward = parse("3*digit:1 + digit:2")
    assert reward.differentiable
    x = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ask(reward, x, PROMPTS).sum(), x)
    parts = [torch.autograd.grad(ask(parse(f"digit:{d}"), x, PROMPTS).sum(), x)[0] for d in (1, 2)]
    torch.testing.assert_close(gradient, 3 * parts[0] + parts[1])


def test_a_part_that_is_not_finite_is_named() -> None:
    class Broken:
        name, differentiable = "broken", False

        def __call__(self, images: Tensor, prompts: object, metadata: object) -> Tensor:
            return torch.tensor([1.0, float("nan"), 1.0])

    with pytest.raises(UserError, match="The reward broken is nan for image 1 of 3"):
        ask(Sum([(1.0, parse("jpeg")), (0.0, Broken())]), IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("jpg", "did you mean 'jpeg'? `diffrl finetune --help` lists all."),
        ("nope", "are known, 'aesthetic' among them. `diffrl finetune --help` lists all."),
        ("zzzz", "are known, 'aesthetic' among them. `diffrl finetune --help` lists all."),
        ("pickscor:x", "did you mean 'pickscore'"),
        ("", "not of the form"),
        (" ", "not of the form"),
        ("jpeg + 2*", "'2*' is not of the form"),
        ("jpeg + ", "reward 'jpeg + ': a reward is missing after '+'"),
        ("jpeg +", "reward 'jpeg +': a reward is missing after '+'"),
        ("jpeg + + digit", "a reward is missing after '+'"),
        (" + jpeg", "a reward is missing before '+'"),
        ("jpeg+digit", "'jpeg+digit' is not of the form"),
        ("jpeg+digit", "did you leave out the blanks about the +: 'jpeg + digit'"),
        ("jpeg+0.5*png", "did you leave out the blanks about the +: 'jpeg + 0.5*png'"),
        ("jpeg - 0.5*png", "subtracted by a weight below 0: 'jpeg + -0.5*png'"),
        ("jpeg -png", "subtracted by a weight below 0: 'jpeg + -png'"),
        ("two*jpeg", "weight 'two'"),
        ("nan*jpeg", "weight 'nan'"),
        ("inf*jpeg", "weight 'inf'"),
        ("*jpeg", "weight ''"),
        ("0*jpeg", "reward '0*jpeg': every weight is 0, so there is nothing to learn"),
        ("0*jpeg + 0*digit", "every weight is 0"),
        ("emoji:blue hart", "reward 'emoji:blue hart': tiny-emoji knows no 'hart'; did you mean 'heart'?"),
        ("emoji:dog", "tiny-emoji knows no 'dog'; the objects: heart, star"),
        ("vlm:http://localhost/v1", "reward 'vlm:http://localhost/v1': expected vlm:URL#MODEL[#FILE]"),
        ("png:3", "'png' takes no argument"),
        ("human:0", "reward 'human:0': the number of votes is a whole number from 1, not 0"),
        ("human:-1", "a whole number from 1, not -1"),
        ("jpeg + human:1.5", "human:1.5: the number of votes is a whole number from 1, not 1.5"),
        ("human:.", ". is a folder; the votes of a run are human:votes.json"),
        ("human:docs", "docs is a folder; the votes of a run are human:docs/votes.json"),
        ("clip", "reward 'clip' needs an argument: clip:PATH"),
        ("geneval", "reward 'geneval' needs an argument: geneval:FILE.py#NAME"),
        ("jpeg + clip", "reward 'jpeg + clip': 'clip' needs an argument: clip:PATH"),
        ("digit:12", "reward 'digit:12': the argument is one digit"),
        ("jpeg + digit:12", "reward 'jpeg + digit:12': digit:12: the argument is one digit"),
        ("jpeg + 2*jpeg", "stands twice"),
        ("remote:ftp://x", "http://"),
        ("richhf:/no/such/folder#nan", "the weight of artifacts, a number"),
        ("clip:/no/such/folder", "'/no/such/folder' is no folder"),
    ],
)
def test_mistakes_are_named(spec: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(spec)
    assert said in str(caught.value)


def test_an_argument_may_hold_anything() -> None:
    assert parse("0.1*remote:http://localhost:8000/a*b?c=d + jpeg").name.startswith(
        "0.1*remote:http://localhost:8000/a*b?c=d"
    )
