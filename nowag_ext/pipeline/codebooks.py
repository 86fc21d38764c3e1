"""The codebooks that linears share: trained on their weights, then under error feedback."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from nowag_ext.codebook import Codebook
from nowag_ext.codebook_training import train_codebook
from nowag_ext.feedback import EntrySums, shared_points
from nowag_ext.methods import VQSettings
from nowag_ext.pipeline.blocks import Blocks, Group
from nowag_ext.pipeline.ranks import ALONE, Ranks, common_groups, threads_of_all
from nowag_ext.pipeline.statistics import GroupStatistics
from nowag_ext.pipeline.streams import embedded
from nowag_ext.plan import Unit
from nowag_ext.report import Progress
from nowag_ext.resume import LayerStore
from nowag_ext.vq import check_code

SCOPES = ("model", "kind", "layer")

# Weights to train a codebook on, rows of all layers, and most iterations. More of both lowers the
# error of the nearest entries, but hardly that which feedback and corrected targets leave: on
# SmolLM2 half of the rows and 40 iterations end 2 % below an eighth of the rows and 12.
TRAINING_WEIGHTS = 1 << 25
TRAINING_ITERATIONS = 30

# Windows whose Hessians entries are re-estimated under: the metric need not be exact.
_WINDOWS = 8

# Weights to re-estimate from, rows of all layers: 5,000 points an entry of d=6 at 2 bits. A quarter
# of that gave SmolLM2 a KL 3 % higher, at the same perplexity, and saved little.
_ESTIMATION_WEIGHTS = 1 << 27


class SharedCodebooks:
    """Codebooks by the linears that they serve.

    Args:
        scope: which linears share one: of the whole "model", of a "kind" (the last part of their
            names), or each "layer" its own, which this has nothing to do with.
        ranks: that have the same codebooks: rank 0's.

    Raises:
        ValueError: another scope.
    """

    def __init__(self, scope: str, ranks: Ranks = ALONE) -> None:
        if scope not in SCOPES:
            raise ValueError(f"codebook_scope must be one of {', '.join(SCOPES)}, not {scope!r}.")
        self.scope = scope
        self._ranks = ranks
        self._codebooks: dict[str, Codebook] = {}
        self._names: dict[str, str] = {}  # of the codebook, by linear
        self._forms: dict[str, VQSettings] = {}  # of the first linear it serves, by its name

    def of(self, linear: str) -> Codebook | None:
        """The codebook of a linear, None if it has its own, or none."""
        name = self._names.get(linear)
        return None if name is None else self._codebooks[name]

    def name_for(self, linear: str, settings: VQSettings) -> str:
        """What the codebook is called that a linear of these settings shares."""
        whose = "model" if self.scope == "model" else linear.rpartition(".")[2]
        return f"{whose}-d{settings.d}-{check_code(settings.d, settings.bits)}"

    def assign(self, units: Mapping[str, Unit]) -> None:
        """Says which codebook serves which linear, before there are any."""
        if self.scope == "layer":
            return
        for linear, unit in units.items():
            if isinstance(unit.settings, VQSettings):
                name = self.name_for(linear, unit.settings)
                self._names[linear] = name
                self._forms.setdefault(name, unit.settings)

    def load(self, store: LayerStore | None, key: str, device: torch.device) -> bool:
        """Takes the codebooks of an interrupted run, if they are there."""
        found = None if store is None else store.get_codebooks(key, device)
        self._share(found or {}, device)
        return set(self._codebooks) == set(self._forms)

    def _share(self, codebooks: Mapping[str, Codebook], device: torch.device) -> None:
        """Takes rank 0's codebooks."""
        said, _ = self._ranks.tell(({name: one.entries for name, one in codebooks.items()}, None))
        self._codebooks = {
            name: Codebook(entries.to(device), name) for name, entries in said.items()
        }

    def save(self, store: LayerStore | None, key: str) -> None:
        """Keeps the codebooks for a run that goes on from here."""
        if store is not None:
            store.put_codebooks(key, self._codebooks)

    def train(
        self, units: Mapping[str, Unit], device: torch.device, progress: Progress | None
    ) -> None:
        """Trains the codebooks on the weights, under the activation norms."""
        trained = {}
        if self._ranks.first:
            with threads_of_all():
                trained = self._trained(units, progress)
        self._share(trained, device)

    def _trained(self, units: Mapping[str, Unit], progress: Progress | None) -> dict[str, Codebook]:
        trained = {}
        for name, settings in self._forms.items():
            served = [unit for linear, unit in units.items() if self._names.get(linear) == name]

            def report(iteration: int, iters: int, _objective: float, name: str = name) -> None:
                if progress is not None:
                    now = "" if iteration else " being seeded"
                    progress(f"codebook {name}{now}", iteration, iters)

            trained[name] = train_codebook(
                ((unit.weight, unit.act_norms) for unit in served),
                d=settings.d,
                bits=settings.bits,
                name=name,
                share=self._share_of_rows(name, units, TRAINING_WEIGHTS),
                iters=min(settings.iters, TRAINING_ITERATIONS),
                init=settings.init,
                seed=settings.seed,
                progress=report,
            )
        return trained

    def _share_of_rows(self, codebook: str, units: Mapping[str, Unit], most: int) -> float:
        """Of the rows of all linears that it serves, so many that at most so many weights come."""
        weights = sum(
            units[linear].size for linear, name in self._names.items() if name == codebook
        )
        return min(1.0, most / weights)

    def re_estimate(
        self,
        units: Mapping[str, Unit],
        blocks: Blocks,
        windows: Tensor,
        progress: Progress | None,
    ) -> None:
        """Moves the entries to where error feedback wants them, block by block of the dense model.

        Least squares over points of a share of the rows, as feedback has moved them, each in the
        metric of its position (kmeans_feedback.h).
        """
        if not self._codebooks:
            return
        weights = sum(units[linear].size for linear in self._names)
        sums = {
            name: EntrySums(len(codebook.entries), codebook.d, weights, codebook.entries.device)
            for name, codebook in self._codebooks.items()
        }
        shares = {
            name: self._share_of_rows(name, units, _ESTIMATION_WEIGHTS) for name in self._codebooks
        }
        ranks = self._ranks
        windows = windows[: max(_WINDOWS, ranks.count)]
        hidden = embedded(blocks, windows[ranks.share(len(windows))])
        for index in range(len(blocks.layers)):
            if progress is not None:
                progress("codebook re-estimated", index, len(blocks.layers))
            self._add_layer(sums, shares, units, self._hessians(blocks, index, hidden))
        ranks.add_up(one.sums for one in sums.values())
        for name, codebook in self._codebooks.items():
            entries = sums[name].solve(codebook.entries.float()).half()
            if torch.isfinite(entries).all():
                self._codebooks[name] = Codebook(entries, name)
        self._share(self._codebooks, windows.device)

    def _add_layer(
        self,
        sums: Mapping[str, EntrySums],
        shares: Mapping[str, float],
        units: Mapping[str, Unit],
        hessians: Mapping[str, Tensor],
    ) -> None:
        """Adds this rank's linears of a layer, a share of their rows, to what entries suit best."""
        owners = self._ranks.owners({linear: units[linear].size for linear in hessians})
        for linear, hessian in hessians.items():
            if owners[linear] == self._ranks.rank:
                name = self._names[linear]
                codebook, weight = self._codebooks[name], units[linear].weight
                points = shared_points(weight, hessian, codebook.d, shares[name])
                points.assign(codebook.entries.float(), sums[name], last=True)

    def _hessians(self, blocks: Blocks, index: int, hidden: Tensor) -> dict[str, Tensor]:
        """By linear that shares a codebook and reads anything; the layer is run, in place."""
        hessians = {}
        for group, statistics in _advance(blocks, index, hidden, self._ranks):
            served = [name for name in group.names if name in self._names]
            if served and statistics.tokens > 0:
                hessians.update(dict.fromkeys(served, statistics.hessian()))
        return hessians


def _advance(
    blocks: Blocks, index: int, hidden: Tensor, ranks: Ranks
) -> list[tuple[Group, GroupStatistics]]:
    """Runs a layer on all windows, in place; the statistics of its groups."""
    blocks = blocks.copied(index)
    groups = common_groups(ranks, blocks, index, hidden)
    gathered = [GroupStatistics(group.in_features, hidden.device) for group in groups]

    def look(statistics: GroupStatistics, tensor: Tensor) -> None:
        statistics.add(tensor.reshape(-1, tensor.shape[-1]))

    looks = {
        group.names[0]: partial(look, statistics)
        for group, statistics in zip(groups, gathered, strict=True)
    }
    for window in hidden.split(1):
        window.copy_(blocks.run(index, window, looks))
    for statistics in gathered:
        statistics.add_up(ranks)
    return list(zip(groups, gathered, strict=True))
