"""Published scores of D4RL's tasks, to stand beside ours: from whom, by which protocol, of which algorithm.

`published.csv` beside this file was compiled by hand from the sources below; spreads are standard deviations over
seeds, where they are given.
"""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

CORL, KIT, PAPERS = "CORL", "OfflineRL-Kit", "papers"
SOURCES = {
    CORL: "CORL (Tarasov et al. 2022, arXiv 2210.07105), its tables of last and best scores: mean ± standard deviation "
    "over seeds.",
    KIT: "OfflineRL-Kit (Sun 2023, github.com/yihaosun1124/OfflineRL-Kit), mean ± standard deviation over seeds; which "
    "evaluations are taken is not recorded here.",
    PAPERS: "The algorithms' papers as quoted in tables 1 and 2 of Generative Trajectory Policies, so at second hand; "
    "no spreads are given. Each paper has a protocol of its own: Diffusion-QL's is the best evaluation of training. "
    "The version of the antmaze data is not stated.",
}
"""Where the scores are from."""
_OURS = {
    "BC": "bc",
    "TD3+BC": "td3_bc",
    "IQL": "iql",
    "ReBRAC": "rebrac",
    "Diffusion-QL": "diffusion_ql",
    "Diffusion-BC": "diffusion_bc",
    "Consistency-AC": "consistency_ac",
    "IDQL-A": "idql",
    "QGPO": "qgpo",
}
"""Their names of the algorithms, and ours."""


class Published(NamedTuple):
    """A published score of a task."""

    source: str
    """One of `SOURCES`."""
    protocol: str
    """ "last" or "best"; "": not stated."""
    algorithm: str
    """As the source calls it."""
    mean: float
    std: float | None
    """The standard deviation over seeds."""

    @property
    def agent(self) -> str:
        """What the algorithm is called here; as the source does, where there is none."""
        return _OURS.get(self.algorithm, self.algorithm)

    def __str__(self) -> str:
        """For example `106.9 ± 12.3`."""
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


def of_task(task: str) -> list[Published]:
    """The published scores of a task of this exact id, such as hopper-medium-v2; [] where there are none.

    A source that names no version stands for every version.
    """
    return [*_table().get(task, ()), *_table().get(task.rsplit("-v", 1)[0], ())]


@cache
def _table() -> dict[str, list[Published]]:
    lines = files("diffrl.runs.study").joinpath("published.csv").read_text().splitlines()
    table: dict[str, list[Published]] = {}
    for line in csv.DictReader(lines):
        std = float(line["std"]) if line["std"] else None
        one = Published(line["source"], line["protocol"], line["algorithm"], float(line["mean"]), std)
        table.setdefault(line["task"], []).append(one)
    return table
