"""Compression from disk to disk: a model is read layer by layer, and never whole in memory."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nowag_ext.calibrate import checked_windows
from nowag_ext.checkpoint import save_compressed, save_dense
from nowag_ext.decoder import check_patterns, decoder_linears, matches
from nowag_ext.files import check_apart, check_vacant, require_space, temporary_directory
from nowag_ext.forecast import Sizes, sizes, skeleton
from nowag_ext.gguf_source import read_once
from nowag_ext.methods import LayerSettings, VQSettings
from nowag_ext.offload import bring_back, twin
from nowag_ext.pipeline.codebooks import SharedCodebooks
from nowag_ext.pipeline.compress import compress as compress_blocks
from nowag_ext.pipeline.distill import distill
from nowag_ext.pipeline.ranks import own_device
from nowag_ext.plan_head import head_settings, plan_head
from nowag_ext.report import ModelReport, Progress
from nowag_ext.resume import LayerStore, open_store, work_directory
from nowag_ext.source import check_found, named_dtype, open_dense_model, open_tokenizer
from nowag_ext.version import __version__

_WRITERS = {"nowag": save_compressed, "dense": save_dense}

# Given a model's tokenizer and where finished work is kept, what compresses the model in place.
Prepare = Callable[[Any, LayerStore], Callable[[Any], None]]


def compress(
    model_or_path: Any,
    tokens: Tensor,
    method: str = "vq",
    ignore: Sequence[str] = ("lm_head",),
    *,
    output: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    codebook_scope: str = "model",
    min_coverage: float = 0.8,
    work_dir: str | os.PathLike[str] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    head: Mapping[str, Any] | None = None,
    distill_tokens: Tensor | None = None,
    progress: Progress | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    checkpoint_format: str = "nowag",
    trust_remote_code: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> Any:
    """Compresses a causal LM's decoder layers block by block, with error feedback.

    At the same bits the error is less than half of ``compress_model``'s, which looks at every layer
    alone and at nothing but its activation norms. Everything is checked before work starts.

    A model in memory is changed in place, at the very end: after any exception, an interrupt
    included, it is as it was. A model on disk is read layer by layer and written to ``output``, as
    by ``nowag-ext compress``: the model need not fit into memory, and what is finished is kept in
    ``output``.partial until the output is whole. The same call, interrupted, goes on from there and
    ends in the same bits (at the same number of threads).

    Args:
        model_or_path: a Hugging Face causal LM, dense; or a directory, a hub id or a .gguf file.
        tokens: calibration text, int64 or int32 [windows, length], without padding. More text helps
            more than anything else; text like what the model will read helps most.
        method, ignore, overrides, min_coverage, settings: as for ``compress_model``. A codebook
            that is shared takes at most 30 iterations.
        output: the directory to write, for a model on disk.
        codebook_scope: which linears of method "vq" share a codebook: "model", all of them; "kind",
            those of one name (all down_proj, say); "layer", none.
        work_dir: for a model in memory, a directory for what is finished, as ``output``.partial is;
            remove it when the model is saved. None: nothing is kept.
        offload_dir: a directory for the hidden states of the calibration text, twice 4 bytes a
            token and hidden unit, which are otherwise in memory. They leave nothing there.
        head: settings of method "vq", such as {"d": 2, "bits": 4}, for the lm_head and, where that
            is tied to it, the embedding. None: they stay dense.
        distill_tokens: for a model on disk, other text to tune the result on (``distill``), with
            windows of 512 tokens, say. One in memory is gone when it is compressed: keep a copy.
        progress: called with (what is done, weights done, weights in all; of a distillation, how
            much of how much).
        dtype, device, checkpoint_format, trust_remote_code, resume, overwrite: with an ``output``
            only. dtype: of the model, "auto" (default) for the checkpoint's own (float32 for
            .gguf). device: where all is computed, and what is not on disk is; one in memory is
            compressed where it is.
            checkpoint_format: "nowag" (default), or "dense", which loads anywhere and is no
            smaller. trust_remote_code: run the code that the model brings. resume: False forgets
            what an earlier call has left in ``output``.partial. overwrite: replace ``output`` if
            nowag_ext wrote all that is in it.

    Returns:
        The same model, with a ``nowag_report`` (ModelReport), ready for ``save_pretrained``; with
        an ``output``, the ModelReport.

    Raises:
        ValueError: unfit settings, layers, weights or tokens, or a model whose layers cannot be run
            one after another (the sentence names the layer); an output without a path, or a path
            without one; what is kept was made with other arguments.
        TypeError: a setting that the method does not have, tokens that are no integers.
        OSError: no such model; an output that is not empty or cannot be written; a full disk.
    """
    common: dict[str, Any] = {
        "overrides": overrides or {}, "codebook_scope": codebook_scope,
        "min_coverage": min_coverage, "offload_dir": offload_dir, "head": head,
        "progress": progress, "work_dir": work_dir, **settings,
    }  # fmt: skip
    if not isinstance(model_or_path, str | os.PathLike):
        of_files = (output, dtype, device, checkpoint_format, trust_remote_code, resume, overwrite)
        if of_files != (None, "auto", "cpu", "nowag", False, True, False):
            raise ValueError(
                "output, dtype, device, checkpoint_format, trust_remote_code, resume and overwrite "
                "are for a model on disk, given by its path or hub id, not for one in memory "
                f"({type(model_or_path).__name__}): save that with save_compressed."
            )
        if distill_tokens is not None:
            raise ValueError(
                "distill_tokens is for a model on disk, given by its path or hub id: of one in "
                "memory keep a copy, and call distill with it afterwards."
            )
        return compress_blocks(model_or_path, tokens, method, ignore, **common)
    if output is None:
        raise ValueError(
            f"output must be given, the directory to write, where the model is on disk "
            f"({os.fspath(model_or_path)}): to have it in memory, load it first."
        )
    if work_dir is not None:
        raise ValueError(
            "work_dir is for a model in memory: with an output, what is finished is kept in "
            f"{work_directory(Path(output))}."
        )
    job = Job(
        os.fspath(model_or_path), output, method, settings, overrides or {}, tuple(ignore),
        SharedCodebooks(codebook_scope).scope, head, dtype=dtype, device=str(device),
        offload_dir=offload_dir, checkpoint_format=checkpoint_format,
        trust_remote_code=trust_remote_code, overwrite=overwrite,
    )  # fmt: skip
    if distill_tokens is not None:
        _digest("distill_tokens", distill_tokens)  # checked; layers do not follow from them
    made_with = {
        **job.made_with(), "tokens": _digest("tokens", tokens),
        "torch": str(torch.__version__), "OMP_NUM_THREADS": torch.get_num_threads(),
    }  # fmt: skip

    def prepare(_tokenizer: Any, store: LayerStore) -> Callable[[Any], None]:
        def compress_loaded(model: Any) -> None:
            work: dict[str, Any] = {**common, "work_dir": store}
            if distill_tokens is None:
                compress_blocks(model, tokens, method, ignore, **work)
                return
            checked_windows(model, distill_tokens)
            dense = twin(model)
            compress_blocks(model, tokens, method, ignore, **work)
            distill_compressed(model, dense, distill_tokens, store, offload_dir, progress)

        return compress_loaded

    report, left_out = job.run(prepare, made_with, resume=resume)
    for name, reason in left_out.items():
        warnings.warn(f"{name} was not copied: {reason}.", stacklevel=2)
    return report


def _digest(name: str, tokens: Any) -> str:
    """Tells texts apart; raises for what is none, before anything else is done."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be a tensor of int64 or int32, not {kind}.")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"{name} must have shape [windows, length], not {tuple(tokens.shape)}.")
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.detach().cpu().long().contiguous().numpy().data)
    return f"of SHA-256 {digest.hexdigest()[:12]}..."


@contextmanager
def of_argument(name: str) -> Iterator[None]:
    """What is refused in here is said to be of this argument, where a command shows it."""
    try:
        yield
    except Exception as error:
        error.argument = name  # type: ignore[attr-defined]
        raise


@contextmanager
def kept(output: Path, *, resume: bool) -> Iterator[LayerStore]:
    """Where what is finished is kept until the output is whole, held by this run alone.

    An exception has the directory as its ``kept`` if there is something to go on from.
    """
    directory = work_directory(output)
    if os.path.lexists(directory) and not directory.is_dir():
        with of_argument("output"):
            raise FileExistsError(
                f"{directory}, where finished work is to be kept, exists and is no directory."
            )
    with open_store(directory) as store:
        assert store is not None
        try:
            if not resume:
                store.clear()
            yield store
        except BaseException as stop:
            if store.keeps_something():
                stop.kept = directory  # type: ignore[attr-defined]
            raise


def check_offload(directory: str | os.PathLike[str] | None, place: torch.device) -> None:
    """Raises ValueError for hidden states on disk and a model on a device."""
    if directory is not None and place.type != "cpu":
        raise ValueError(
            "hidden states go to disk (offload_dir, --offload) for a model on the CPU, not on "
            f"{place}."
        )


def source_facts(source: str, dtype: str) -> dict[str, Any]:
    """What the results of any run on a model follow from, by argument (``LayerStore.begin``)."""
    return {
        "model": os.path.realpath(source) if Path(source).exists() else source,
        "dtype": dtype,
        "nowag_ext": __version__,
    }


def distill_compressed(
    model: Any,
    dense: Any,
    tokens: Tensor,
    store: LayerStore,
    offload_dir: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> None:
    """Tunes what a model was compressed to, which is part of what that took."""
    bring_back(model)  # what is left of it
    learnt = distill(
        model, dense, tokens, work_dir=store, offload_dir=offload_dir, progress=progress
    )
    add_stage(model, "distillation", learnt.seconds)


def add_stage(model: Any, name: str, seconds: float) -> None:
    """Reports what has been done beside the compression as a stage of it."""
    report = model.nowag_report
    model.nowag_report = replace(
        report, seconds=report.seconds + seconds, stages={**report.stages, name: seconds}
    )


@dataclass(frozen=True)
class Job:
    """What is compressed, how, and where to: checked as far as can be without the model.

    Attributes:
        offload_dir: where hidden states go.
        layers: the settings of every layer.
        head_settings: those of the head, if that is to be packed.
        place: ``device``, of this process.
        target: ``output``, links followed.

    Raises:
        ValueError, TypeError: unfit settings.
        OSError: the output cannot be written.
    """

    source: str
    output: str | os.PathLike[str]
    method: str
    settings: Mapping[str, Any]
    overrides: Mapping[str, Mapping[str, Any]]
    ignore: tuple[str, ...]
    codebook_scope: str
    head: Mapping[str, Any] | None = None
    dtype: str | torch.dtype = "auto"
    device: str = "cpu"
    offload_dir: str | os.PathLike[str] | None = None
    checkpoint_format: str = "nowag"
    trust_remote_code: bool = False
    overwrite: bool = False
    layers: LayerSettings = field(init=False)
    head_settings: VQSettings | None = field(init=False)
    place: torch.device = field(init=False)
    target: Path = field(init=False)

    def __post_init__(self) -> None:
        if self.checkpoint_format not in _WRITERS:
            raise ValueError(
                f"checkpoint_format must be one of {', '.join(_WRITERS)}, "
                f"not {self.checkpoint_format!r}."
            )
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        named_dtype(str(self.dtype))
        layers = LayerSettings(self.method, self.settings, self.overrides)
        object.__setattr__(self, "layers", layers)
        place = own_device(self.device)
        check_offload(self.offload_dir, place)
        object.__setattr__(self, "place", place)
        head = None if self.head is None else head_settings(self.head)
        object.__setattr__(self, "head_settings", head)
        with of_argument("output"):
            target = check_vacant(self.output, overwrite=self.overwrite)
            check_apart(target, self.source)
        object.__setattr__(self, "target", target)

    def made_with(self) -> dict[str, Any]:
        """What the results follow from but for the text, by argument."""
        return {
            **source_facts(self.source, str(self.dtype)), "device": self.place.type,
            "codebook_scope": self.codebook_scope, "method": self.method,
            **asdict(self.layers.default), "overrides": self.overrides,
            "head": None if self.head_settings is None else asdict(self.head_settings),
            "ignore": [pattern for pattern in self.ignore if pattern != "lm_head"],
        }  # fmt: skip

    def run(
        self,
        prepare: Prepare,
        made_with: Mapping[str, Any],
        *,
        resume: bool = True,
        in_memory: bool = False,
        loading: AbstractContextManager[None] | None = None,
    ) -> tuple[ModelReport, dict[str, str]]:
        """Reads the model, has it compressed, and writes it.

        Args:
            prepare: called before weights are read.
            made_with: what the results follow from, by name; what is kept goes on with the same.
            resume: False forgets what an earlier run has left.
            in_memory: the layers are not left on disk.
            loading: open while the model is being loaded.

        Returns:
            The report, and the files beside the model that were left out, by name, and why.
        """
        with (
            kept(self.target, resume=resume) as store,
            temporary_directory(store.directory, "converted") as converted,
        ):
            store.begin(made_with)
            with read_once():
                outline = self.outline()
                if outline is not None:
                    self.check(outline, store.nbytes())
                tokenizer = open_tokenizer(self.source, trust_remote_code=self.trust_remote_code)
                compress_loaded = prepare(tokenizer, store)
                with loading or nullcontext():
                    model, _ = open_dense_model(
                        self.source, str(self.dtype), tokenizer=tokenizer,
                        offload_folder=None if in_memory else converted, device=self.place,
                        trust_remote_code=self.trust_remote_code,
                    )  # fmt: skip
            if outline is None:
                self.check(model, store.nbytes())
            compress_loaded(model)
            write = _WRITERS[self.checkpoint_format]
            left_out = write(model, tokenizer, self.target, overwrite=self.overwrite)
            store.clear()
        return model.nowag_report, left_out

    def outline(self) -> Any:
        """The model without its weights, or None where only loading it tells (``skeleton``)."""
        check_found(self.source)
        return skeleton(self.source, named_dtype(str(self.dtype)))

    def check(self, model: Any, finished: int = 0) -> None:
        """Raises for what does not fit a model (or its outline), and where there is no room.

        ``finished`` bytes of what is to be written are there already.
        """
        check_patterns(model, self.ignore, "ignore")
        check_patterns(model, list(self.overrides), "overrides")
        for name, linear in decoder_linears(model).items():
            if matches(name, self.ignore):
                continue
            try:
                self.layers.of(name).check_layer(
                    linear.out_features, linear.in_features, self.codebook_scope != "layer"
                )
            except ValueError as error:
                raise ValueError(f"{name} {error}.") from None
        if self.head_settings is not None:
            plan_head(model, self.head_settings)
        size = self.sizes(model).written
        with of_argument("output"):
            require_space(self.target, size - finished)

    def sizes(self, model: Any) -> Sizes:
        """What will be written of a model, or its outline."""
        return sizes(
            model, self.layers, self.ignore, self.codebook_scope, self.head_settings,
            dense=self.checkpoint_format == "dense",
        )  # fmt: skip
