"""A person as the reward: what is learned from votes, and that a run asks, keeps, goes on and replays."""

import contextlib
import dataclasses
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.cli import main
from diffrl.images import resume
from diffrl.images.config import ALGORITHMS, FinetuneConfig
from diffrl.images.rewards import human as module
from diffrl.images.rewards import parse, votes_file, votes_model
from diffrl.images.rewards.human import Human, Vote, quantised, read_votes, write_votes
from diffrl.images.rewards.votes_model import VotesModel
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import Samples, score
from diffrl.images.world import World
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at
from tests.browser import CHROMIUM, Browser
from tests.images.test_command import SMALL, final, mistake


def images(n: int, seed: int = 0) -> Tensor:
    return quantised(torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))


def pairs(n: int, seed: int = 0) -> list[tuple[str, Tensor, Tensor]]:
    """Of a "dark" pair the darker is preferred, of a "light" one the lighter."""
    found = []
    for i, (a, b) in enumerate(zip(images(n, seed), images(n, seed + 1), strict=True)):
        dark, light = sorted((a, b), key=lambda image: float(image.float().mean()))
        found.append(("light", dark, light) if i % 2 else ("dark", light, dark))
    return found


@pytest.fixture
def hardly_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of few steps: that they are of the votes, and of which, is what counts."""
    monkeypatch.setattr(votes_model, "STEPS", 10)


@pytest.mark.long
def test_a_model_learns_what_each_prompt_is_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On pairs that it has not seen; of turned-round votes it learns the opposite; the same votes, the same model."""
    monkeypatch.setattr(votes_model, "STEPS", 100)
    model = VotesModel.fit(pairs(100))
    fresh = pairs(200, seed=10)
    prompts = [prompt for prompt, _, _ in fresh]
    others, best = (torch.stack([pair[i] for pair in fresh]) for i in (1, 2))  # type: ignore[misc]
    right = (model.score(best, prompts) > model.score(others, prompts)).float().mean()
    assert right > 0.75
    turned = VotesModel.fit([(prompt, b, a) for prompt, a, b in pairs(100)])
    assert (turned.score(best, prompts) > turned.score(others, prompts)).float().mean() < 0.25
    few = [VotesModel.fit(pairs(8)).score(best[:4], prompts[:4]) for _ in range(2)]
    assert torch.equal(few[0], few[1])


@pytest.mark.usefixtures("hardly_learned")
def test_a_prompt_without_votes_has_what_is_common() -> None:
    model = VotesModel.fit([("light", a, b) for prompt, a, b in pairs(60) if prompt == "light"])
    batch = images(5)
    model.own.data.zero_()
    assert torch.equal(model.score(batch, ["light"] * 5), model.score(batch, ["new"] * 5))
    with pytest.raises(UserError, match="1x9x8, and the votes are about images of 1x8x8"):
        model.score(torch.zeros(1, 1, 9, 8, dtype=torch.uint8), ["light"])


def test_without_a_vote_every_score_is_0() -> None:
    reward = Human()
    assert torch.equal(reward(torch.rand(3, 1, 8, 8), ["a"] * 3, [{}] * 3), torch.zeros(3))
    reward.at(0, asking=True)
    with pytest.raises(UserError, match="diffrl finetune"):
        reward(torch.rand(3, 1, 8, 8), ["a"] * 3, [{}] * 3)


def test_votes_are_read_as_they_were_written(tmp_path: Path) -> None:
    votes = [Vote(0, "a", ("0" * 64, "1" * 64), 1, None), Vote(3, "b", ("2" * 64, "3" * 64), None, True)]
    write_votes(tmp_path / "votes.json", votes)
    assert read_votes(tmp_path / "votes.json") == votes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "no file of votes"),
        ({"votes": [{"round": 0, "prompt": "a", "images": ["../x"] * 2, "best": 0}]}, "vote 0 is"),
        ({"votes": [{"round": 0, "prompt": "a", "images": ["0" * 64] * 2, "best": 2}]}, "vote 0 is"),
        ({"votes": []}, "nothing to learn from"),
        ({"votes": [{"round": 0, "prompt": "a", "images": ["0" * 64] * 2, "best": 0}]}, "does not exist"),
    ],
)
def test_bad_votes_are_one_line(
    change: dict[str, Any], said: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (quick / "votes.json").write_text(json.dumps({"format": votes_file.FORMAT, "votes": [], **change}))
    assert said in mistake(["finetune", "--reward", "human:votes.json", *SMALL], capsys)


def test_a_run_that_cannot_ask_says_so(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--algo nft" in mistake(["finetune", "--reward", "human", "--algo", "dpo", *SMALL], capsys)
    assert "expected" in mistake(["finetune", "--reward", "human:nowhere.json", *SMALL], capsys)
    words = ["finetune", "--algo", "nft", *SMALL]
    assert "asks nobody" in mistake([*words, "--reward", "png", "--held-out", "human"], capsys)
    assert "human twice" in mistake([*words, "--reward", "human + human:2"], capsys)


@pytest.mark.usefixtures("hardly_learned")
def test_an_evaluation_before_a_round_knows_nothing_of_its_votes(tmp_path: Path) -> None:
    """As where a run was cut after votes of a round that it makes again: else its evaluations would be others."""
    both = torch.rand(2, 1, 8, 8)
    names = [module._digest(image) for image in quantised(both)]
    (tmp_path / module.IMAGES).mkdir()
    for name, image in zip(names, quantised(both), strict=True):
        (tmp_path / module.IMAGES / f"{name}.png").write_bytes(module._png(image))
    votes = [Vote(number, "p", (names[0], names[1]), number, None) for number in (0, 1)]

    def scores(known: list[Vote], number: int) -> Tensor:
        reward = Human()
        reward._folder, reward.votes = tmp_path, known
        reward.at(number, asking=False)
        return reward(both, ["p"] * 2, [{}] * 2)

    for number in (0, 1, 2):
        assert torch.equal(scores(votes, number), scores(votes[:number], number))
    assert not torch.equal(scores(votes, 1), scores(votes, 2))


class Person:
    """Votes at once, and always the same for the same images; counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.votes = 0
        monkeypatch.setattr(module, "open_browser", lambda address: True)
        monkeypatch.setattr(module._Asked, "wait", lambda asked, prompt, files: self._wait(files))

    def _wait(self, files: dict[str, bytes]) -> str:
        assert all(file.startswith(b"\x89PNG") for file in files.values())
        self.votes += 1
        return max(files)  # whichever: the same of the same images


@pytest.mark.usefixtures("hardly_learned")
@pytest.mark.parametrize("micro_batch", [64, 3])
def test_groups_are_of_all_images_of_a_prompt(micro_batch: int, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the micro-batch: the same four, of random prompts, as many groups as were asked for."""
    Person(monkeypatch)
    human, images = Human(2), torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    metadata: list[dict[str, Any]] = [{}] * 24
    prompts = [text for text in "bac" for _ in range(8)]
    none = torch.empty(0)
    samples = Samples(torch.arange(24), prompts, metadata, {}, none, none, images, 24, World())
    with human.opened(quick, 1):
        human.at(0, asking=True)
        total, _ = score(human, samples, micro_batch)
        assert [len(vote.images) for vote in human.votes] == [4, 4]
        digests = [module._digest(image) for image in quantised(images)]
        rows = [sorted(map(digests.index, vote.images)) for vote in human.votes]
        order = torch.randperm(6, generator=generator_at(0, 0, module._ORDER)).tolist()
        assert rows == [[*range(4 * i, 4 * i + 4)] for i in order[:2]]
        whole = human(images, prompts, metadata)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    assert len(set(total.tolist())) > 4


def asked_about(folder: Path, votes: int, prompts: str, kept: list[Vote] | None = None, rounds: int = 1) -> list[Vote]:
    """The votes after rounds of eight images of each prompt, so many asked for in each; with those kept before."""
    human, images = Human(votes), torch.rand(8 * len(prompts), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if kept is not None:
        write_votes(folder / module.FILE, kept)
    with human.opened(folder, rounds):
        for number in range(rounds):
            human.at(number, asking=True)
            human.look(images, [text for text in prompts for _ in range(8)])
    return human.votes


@pytest.mark.usefixtures("hardly_learned")
@pytest.mark.parametrize("votes", [1, 3, 4, 6])
def test_a_round_asks_about_as_many_prompts_as_it_can(votes: int, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt has two votes more than another one, though each has two groups of images."""
    Person(monkeypatch)
    found = asked_about(quick, votes, "badc", rounds=6)
    for number in range(6):
        counts = [sum((vote.round, vote.prompt) == (number, text) for vote in found) for text in "badc"]
        assert sum(counts) == votes
        assert max(counts) - min(counts) <= 1


def test_votes_that_were_asked_for_in_another_order_are_kept(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run has them that another version began: both of one prompt. The others are asked for after them."""
    person = Person(monkeypatch)
    images = quantised(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    digests = [module._digest(image) for image in images]
    (quick / module.IMAGES).mkdir()
    for image, digest in zip(images, digests, strict=True):
        (quick / module.IMAGES / f"{digest}.png").write_bytes(module._png(image))
    kept = [Vote(0, "b", tuple(digests[start : start + 4]), 2, None) for start in (4, 0)]
    assert asked_about(quick, 2, "ba", kept) == kept
    assert person.votes == 0
    found = asked_about(quick, 4, "ba", kept)
    assert found[:2] == kept
    assert [vote.prompt for vote in found] == ["b", "b", "a", "a"]
    assert person.votes == 2


@pytest.mark.long
@pytest.mark.usefixtures("hardly_learned")
def test_enough_is_enough_for_a_run_that_goes_on(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it was cut in the round in which that was said; it is the run that was not cut. Without votes it asks."""
    asked: list[int] = []

    def wait(page: Any, prompt: str, files: dict[str, bytes]) -> Any:
        asked.append(1)
        if len(asked) == 2:
            page.human.asks = False
            return module._ENOUGH
        return max(files)

    opened: list[str] = []
    monkeypatch.setattr(module, "open_browser", lambda address: opened.append(address) or True)
    monkeypatch.setattr(module._Asked, "wait", wait)
    words = ["finetune", "--algo", "nft", "--updates", "1", "--reward", "human:2", "--held-out", "png", *SMALL]
    assert main([*words, "--queries", "16", "--out", "run"]) == 0
    assert len(asked) == 2
    (vote,) = read_votes(quick / "run" / "votes.json")
    expected = final(quick / "run")
    shutil.rmtree(quick / "run" / "checkpoints" / "000000001")
    capsys.readouterr()
    resume(quick / "run", quiet=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "You have said `Enough votes`: the run goes on by the votes that there are. To vote again," in said
    assert "You are asked" not in said
    assert len(asked) == 2
    again = final(quick / "run")
    assert all(torch.equal(a, again[name]) for name, a in expected.items())
    assert len(opened) == 1
    assert read_votes(quick / "run" / "votes.json") == [vote]
    (quick / "run" / "votes.json").unlink()
    with (human := Human(2)).opened(quick / "run", 1):
        assert human.asks


def call_page(address: str, call: str, value: Any = None) -> Any:
    """What a page of votes answers to a call of its script."""
    request = urllib.request.Request(
        f"{address}{call}", json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def test_a_round_of_fewer_groups_has_a_last_choice_and_enough_is_kept_when_it_is_said(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the run trains, too: it may be cut before its next round."""
    addresses: queue.Queue[str] = queue.Queue()
    human, batch = Human(4, ready=addresses.put), torch.rand(8, 1, 8, 8)

    with human.opened(quick, 2):
        human.at(0, asking=True)
        ask = partial(call_page, addresses.get(timeout=60))
        run = threading.Thread(target=human.look, args=(batch, ["a"] * 8), daemon=True)
        run.start()
        while not (first := ask("state"))["group"]:
            time.sleep(0.01)
        assert first["left"] == 2, "of a prompt there are two groups"
        second = ask("choose", {"images": first["group"]["images"], "best": 0})
        assert second["left"] == 1
        last = ask("choose", {"images": second["group"]["images"], "best": 0})
        assert (last["group"], last["left"]) == (None, 0)
        run.join(60)
        votes = read_votes(quick / "votes.json")
        assert ask("enough")["asks"] is False
        assert json.loads((quick / "votes.json").read_text())["enough"] is True
        assert read_votes(quick / "votes.json") == votes
    other = Human(4, ready=addresses.put)
    with other.opened(quick, 2):
        assert not other.asks
    assert "delete votes.json" in " ".join(capsys.readouterr().err.split()).replace(f"{quick}/", "")


def test_a_number_is_one_whatever_lies_in_the_folder(quick: Path) -> None:
    (quick / "4").mkdir()
    (quick / "5").write_text("")
    for votes in (4, 5, 6):
        reward = parse(f"0.5*human:{votes} + png")
        assert reward.terms[0][1].per_round == votes
    with pytest.raises(UserError, match="from 1, not 0"):
        parse("human:0")


def test_votes_are_taken_elsewhere_with_their_images(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone they are refused, and so are those about another model's images: before anything is made."""
    for name in ("run", "copy"):
        (quick / name).mkdir()
    files = [quantised(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i))[None])[0] for i in range(2)]
    names = [module._digest(image) for image in files]
    write_votes(quick / "run" / "votes.json", [Vote(0, "p", (names[0], names[1]), 0, None)])
    shutil.copy(quick / "run" / "votes.json", quick / "copy")
    by = ["finetune", *SMALL, "--out", "by", "--reward"]
    assert main([*by, "human:copy/votes.json"]) == 2
    said = capsys.readouterr().err
    assert "does not exist" in said
    assert "copy the run's folder `votes` beside `votes.json`" in said
    assert "checksums" not in said
    (quick / "copy" / "votes").mkdir()
    for image, name in zip(files, names, strict=True):
        (quick / "copy" / "votes" / f"{name}.png").write_bytes(module._png(image))
    assert "copy is a folder; the votes of a run are human:copy/votes.json" in mistake([*by, "human:copy"], capsys)
    for words in (
        ["human:copy/votes.json"],
        ["0.5*human:copy/votes.json + png"],
        ["png", "--held-out", "human:copy/votes.json"],
    ):
        said = mistake([*by, *words], capsys)
        assert "human:copy/votes.json has votes about images of 3x32x32, and tiny-digits makes images of 1x8x8" in said
        assert not (quick / "by").exists()
    said = mistake([*by, "human:copy/votes.json", "--model", "tiny-latents"], capsys)
    assert "votes about images of 3x32x32, and tiny-latents makes images of 1x32x32" in said
    write_votes(quick / "copy" / "votes.json", [Vote(0, "p", (names[1], names[0]), 0, None)])
    program = "import sys; from diffrl.images import suited; from diffrl.images.config import FinetuneConfig\n"
    program += "suited.refuse(FinetuneConfig(model='tiny-emoji', reward='human:copy/votes.json'))\n"
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0, "torch is loaded for nothing"


def test_a_person_is_asked_by_default_for_what_a_person_can_do() -> None:
    """Fifty to 250 choices with each algorithm that asks a person, whatever the number of images scored is."""
    for algo, schema in ALGORITHMS.items():
        if "reward" in schema.options() and not (config := FinetuneConfig(algo=algo, reward="human")).scored_before:
            choices = int(re.findall(r"at most (\d+) choices", Human().promise(config.rounds))[0])
            assert choices == config.rounds * 4
            assert 50 <= choices <= 250, algo


@pytest.mark.slow
@pytest.mark.usefixtures("hardly_learned")
def test_a_run_goes_on_and_is_made_again(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole; one round and one more; its last round made again, without asking; and by the votes that there are."""
    person = Person(monkeypatch)
    words = ["finetune", "--algo", "nft", "--updates", "1", "--reward", "human:2", "--held-out", "png", *SMALL]
    assert main([*words, "--out", "whole"]) == 0
    assert person.votes == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "You are asked for at most 4 choices (2 rounds, in each the best image of 2 groups of up to 4)." in said
    votes = read_votes(quick / "whole" / "votes.json")
    assert [vote.round for vote in votes] == [0, 0, 1, 1]
    assert [vote.foretold is None for vote in votes] == [True, True, False, False]
    history = json.loads((quick / "whole" / "evaluations.json").read_text())
    assert history[0]["reward"] == 0
    assert history[-1]["reward"] != 0
    assert "round 0 0 images scored held out" in said, "without a vote there is no reward"
    assert "There is no reward before: every evaluation is scored by the votes until then" in said
    run = FinetuneRun.read(quick / "whole")
    assert ["reward" in entry for entry in run.measured] == [False, False, True], "the others have other scales"
    assert all("held_out" in entry for entry in run.measured)
    of_sum = dataclasses.replace(run, config=dataclasses.replace(run.config, reward="human:4 + png"))
    assert ["reward" in entry for entry in of_sum.measured] == [False, False, True]
    fixed = dataclasses.replace(run, config=dataclasses.replace(run.config, reward="human:whole/votes.json"))
    assert fixed.measured == run.history, "votes that are kept are one scale"

    assert main([*words, "--queries", "16", "--out", "cut"]) == 0
    resume(quick / "cut", steps=32, quiet=True)
    assert person.votes == 8
    assert read_votes(quick / "cut" / "votes.json") == votes
    expected, cut = final(quick / "whole"), final(quick / "cut")
    assert all(torch.equal(a, cut[name]) for name, a in expected.items())

    shutil.rmtree(quick / "whole" / "checkpoints" / "000000002")
    resume(quick / "whole", quiet=True)
    assert "You are asked for at most 0 choices (1 round" in " ".join(capsys.readouterr().err.split())
    assert person.votes == 8, "votes that are kept are not asked for again"
    again = final(quick / "whole")
    assert all(torch.equal(a, again[name]) for name, a in expected.items())

    assert main(["finetune", "--reward", "human:whole/votes.json", "--held-out", "png", *SMALL, "--out", "by"]) == 0
    assert person.votes == 8
    scores = parse("human:whole/votes.json")(torch.rand(4, 1, 8, 8), ["3"] * 4, [{}] * 4)
    assert len(set(scores.tolist())) == 4

    image = next((quick / "whole" / "votes").iterdir())
    next(path for path in (quick / "cut" / "votes").iterdir() if path.name != image.name).replace(image)
    assert "is not the image that was voted on" in mistake(
        ["finetune", "--reward", "human:whole/votes.json", *SMALL], capsys
    )


@pytest.mark.long
def test_a_person_who_prefers_nothing_is_not_asked_whether_the_reward_looks(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equally good throughout: the votes are named, and a 0 that nobody meant is shown as no reward."""
    Person(monkeypatch)
    monkeypatch.setattr(module._Asked, "wait", lambda asked, prompt, files: None)
    words = ["finetune", "--algo", "nft", "--updates", "1", "--reward", "human:2", "--held-out", "png", *SMALL]
    assert main([*words, "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert [vote.best for vote in read_votes(quick / "run" / "votes.json")] == [None] * 4
    assert "Round 1: by the votes until then none of 16 images is better than another of its prompt" in said
    assert "2 of 2 rounds made no update: no vote preferred an image until then." in said
    assert "There is no reward: no vote has preferred an image." in said
    words[words.index("human:2")] = "human:2 + 0.5*jpeg"  # as little of a sum with another reward
    assert main([*words, "--out", "sum"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "There is no reward: no vote has preferred an image." in said
    assert re.search(r"round +\d+ [^│]*images reward ", said) is None
    assert "human:2 0.000" not in said.replace("│", " ").replace("  ", " ")
    assert "Does the reward look" not in said
    assert "images scored reward" not in said
    assert "\u2502 reward" not in said
    assert main(["compare", "run", "--out", "page.html"]) == 0
    assert "<th class=n>reward</th>" not in (quick / "page.html").read_text()


def test_a_vote_is_answered_with_the_next_images_and_can_be_taken_back(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a round the page goes from group to group; back is to the group before, whose vote then counts once."""
    addresses: queue.Queue[str] = queue.Queue()
    human = Human(3, ready=addresses.put)
    batch, prompts = torch.rand(12, 1, 8, 8), [text for text in "abc" for _ in range(4)]

    with human.opened(quick, 1):
        human.at(0, asking=True)
        ask = partial(call_page, addresses.get(timeout=60))
        run = threading.Thread(target=human.look, args=(batch, prompts), daemon=True)
        run.start()
        while not (first := ask("state"))["group"]:
            time.sleep(0.01)
        assert (first["left"], first["back"]) == (3, False)
        shown = {"images": first["group"]["images"]}
        assert ask("back", shown)["group"] == first["group"], "nothing is before the first"
        second = ask("choose", {**shown, "best": 0})
        assert second["group"] != first["group"]
        assert (second["left"], second["back"], second["votes"]) == (2, True, 1)
        again = ask("back", {"images": second["group"]["images"]})
        assert (again["group"], again["left"], again["back"], again["votes"]) == (first["group"], 3, False, 0)
        assert read_votes(quick / "votes.json") == []
        assert ask("choose", {**shown, "best": 2})["group"] == second["group"]
        third = ask("choose", {"images": second["group"]["images"], "best": None})
        assert third["left"] == 1
        again = ask("back", {"images": third["group"]["images"]})
        assert (again["group"], again["left"], again["votes"]) == (second["group"], 2, 1), "from the last group, too"
        again = ask("back", {"images": third["group"]["images"]})
        assert (again["group"], again["votes"]) == (second["group"], 1), "a key that was pressed twice goes back once"
        assert ask("choose", {"images": second["group"]["images"], "best": None})["group"] == third["group"]
        last = ask("choose", {"images": third["group"]["images"], "best": 1})
        assert (last["group"], last["left"], last["back"]) == (None, 0, False), "the round is over: it trains"
        run.join(60)
    assert [vote.best for vote in read_votes(quick / "votes.json")] == [2, None, 1]

    other = Human(3, ready=addresses.put)
    with other.opened(quick, 1):
        other.at(0, asking=True)
        ask = partial(call_page, addresses.get(timeout=60))
        run = threading.Thread(target=other.look, args=(batch.flip(-1), prompts), daemon=True)
        run.start()
        while not (first := ask("state"))["group"]:
            time.sleep(0.01)
        assert not first["back"], "the votes that are there are of other images"
        assert ask("back", {"images": first["group"]["images"]})["votes"] == 3
        ask("enough")
        run.join(60)


@pytest.mark.long
@pytest.mark.usefixtures("hardly_learned")
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_a_person_votes_in_a_browser(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a click, a key, "equally good", and "enough", after which the run goes on alone."""
    failures: list[BaseException] = []
    shown: list[list[str]] = []

    def group(page: Browser, votes: int) -> list[str]:
        there = (
            f"document.querySelector('#votes').textContent == '{votes}' && !document.querySelector('#images').hidden"
        )
        for _ in range(4):  # a round lies between some groups, which takes minutes on a busy machine
            with contextlib.suppress(AssertionError):
                page.until(there)
                break
        loaded = "[...document.images].every(image => image.complete && image.naturalWidth == 8)"
        page.until(f"document.images.length > 1 && {loaded}")  # every one of none is loaded at first
        names: list[str] = page.value("[...document.images].map(image => image.src.split('/').pop().slice(0, -4))")
        shown.append(names)
        return names

    def vote(address: str) -> None:
        try:
            with Browser(quick) as page:
                page.open(address)
                group(page, 0)
                page.screenshot(quick / "page.png")
                page.click(".image:nth-child(2)")
                group(page, 1)
                page.press("2")
                group(page, 2)
                page.press("ArrowUp")
                group(page, 1)
                page.press("1")
                group(page, 2)
                said = page.value("document.querySelector('#round').textContent")
                assert said == "round 1, the last choice: it cannot be taken back"
                page.press("ArrowDown")
                group(page, 3)
                page.click("#enough")
                page.until("document.querySelector('#what').textContent == 'Thank you.'")
                assert not page.errors
        except BaseException as error:
            failures.append(error)
            asked = {"Content-Type": "application/json"}  # so that the run ends, and the test with it
            urllib.request.urlopen(urllib.request.Request(f"{address}enough", b"null", asked), timeout=60)

    person: list[threading.Thread] = []

    def ready(address: str) -> bool:
        person.append(threading.Thread(target=vote, args=(address,), daemon=True))
        person[0].start()
        return True

    monkeypatch.setattr(module, "open_browser", ready)
    words = ["finetune", "--algo", "nft", "--updates", "1", "--reward", "human:3", "--held-out", "png"]
    words += ["--prompts", "prompts.txt"]
    (quick / "prompts.txt").write_text("3\n5\n")
    assert main([*words, *SMALL, "--out", "run"]) == 0
    person[0].join(60)
    assert not failures, failures
    votes = read_votes(quick / "run" / "votes.json")
    assert [vote.best for vote in votes] == [1, 0, None]
    assert [list(vote.images) for vote in votes] == shown[:3]
