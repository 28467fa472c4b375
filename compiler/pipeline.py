"""`compile_model`: the phases of a compile, in order, from a model to a build."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from trimtab.compiler.builds.build import Build, find_build
from trimtab.compiler.builds.contents import TOKENIZER
from trimtab.compiler.builds.manifest import FORMAT, Manifest, PassReport, Sizes, TensorInfo, package_versions
from trimtab.compiler.builds.writer import BuildWriter
from trimtab.compiler.checks.corners import corners
from trimtab.compiler.checks.finite import check_finite
from trimtab.compiler.checks.selfcheck import self_check
from trimtab.compiler.data import Dataset, check_inputs, read_data
from trimtab.compiler.data.preparation import read_preparation
from trimtab.compiler.decoder_cache import pasts
from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.inputs import check_sizes
from trimtab.compiler.learned import remedies
from trimtab.compiler.memory import peak_memory_bytes
from trimtab.compiler.phase_timer import PhaseTimer
from trimtab.compiler.profile_cache import measured_profile, profile_digest
from trimtab.compiler.profile_choice import ProfileChoice, choose_profile
from trimtab.compiler.progress import Progress
from trimtab.compiler.recipe import Recipe, load_recipe
from trimtab.compiler.sources import Source, model_path, open_source
from trimtab.compiler.sources.folder import TOKENIZER_FILES
from trimtab.compiler.sources.source import ModelHashes
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.base import ENGINE, MODEL
from trimtab.compiler.task import Task, find_task
from trimtab.passes import Capability, PassContext, PassResult, run_passes
from trimtab.passes.anatomy import Anatomy, find_anatomy, require_ffns
from trimtab.passes.canonicalize.repack import repack
from trimtab.passes.contract import check_needs
from trimtab.passes.dials import Dials, straight_path
from trimtab.passes.errors import DataError, ModelError, TargetError
from trimtab.passes.graph import is_new, save_graph, scratch, stored_bytes
from trimtab.passes.graph.limits import Positions
from trimtab.passes.graph.linear import distinct_bytes
from trimtab.passes.graph.positions import find_positions
from trimtab.passes.graph.ranges import packed_mask
from trimtab.passes.needs import FFNStates, to_measure
from trimtab.passes.precision import Precision
from trimtab.passes.profile import PROFILE, Profile

log = logging.getLogger(__name__)

RECIPE = Path("recipe.yaml")


def compile_model(
    model: Source | Path | str,
    recipe: Recipe | Path | str | dict[str, Any] | None,
    out: Path | str,
    *,
    data: Path | str | None = None,
    profile: Profile | Path | str | None = None,
    target: str | None = None,
    shards: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    allow_pickle: bool = False,
) -> Build:
    """Compile `model` into the build directory `out`, which appears whole or not at all.

    If `out` already holds a build of the same inputs, that build is returned. Weights that no pass changes are copied
    from file to file, so a model may be larger than memory.

    Args:
        model: Hugging Face directory, ONNX file, or a Source.
        recipe: YAML file, mapping or Recipe; None for the default one.
        out: directory of the build; an earlier build there is replaced, anything else is left alone.
        data: file to calibrate on if a pass needs a Profile and none is given.
        profile: a Profile of this model, or its file. By default, if a pass needs one, the Profile in the model's own
            folder; else a new one is measured on `data` and stored in the cache.
        target, shards: override the recipe's options.
        progress: called with (what, done, total).
        force: compile and calibrate again, even if nothing changed.
        allow_pickle: read pickled weights, which can run code of their author.

    Raises:
        TrimtabError: any kind of it; `out` then stays as it was.
    """
    original_recipe = recipe
    recipe = load_recipe(recipe)
    overrides = {key: value for key, value in {"target": target, "shards": shards}.items() if value is not None}
    if overrides:
        recipe = load_recipe(dict(recipe) | overrides)
    if recipe.shards > 1:
        _check_shards(recipe)
    with remedies(model=model, recipe=original_recipe, data=data, profile=profile):
        choice = choose_profile(profile, model, recipe, data=data is not None)
    chosen_profile = choice.profile
    with_remedies = partial(remedies, model=model, recipe=original_recipe, data=data, profile=choice.path or profile)
    with with_remedies():
        check_needs(recipe.passes, chosen_profile)
    if recipe.needs_profile and chosen_profile is None and data is None:
        if not isinstance(model, Source):
            model_path(model)  # a wrong path is refused first: nobody looks for data of a model that is not there
        raise DataError(
            f"pass {recipe.needs_profile[0]} needs to see how the model behaves on data",
            hint="give calibration texts with --data FILE, or a profile with --profile FILE",
        )
    capability = get_target(recipe.target).probe()
    check_fit(recipe, capability)
    dataset = read_data(data) if data is not None and chosen_profile is None and recipe.needs_profile else None
    phases = PhaseTimer(progress)
    with BuildWriter(out) as writer:
        with phases("open the model"):
            source = model if isinstance(model, Source) else open_source(model, allow_pickle=allow_pickle)
            with with_remedies():
                choice.check(source.fingerprint)
            hashes = source.hashes
            key = _key(source, hashes, recipe, capability, dataset, chosen_profile)
        if not force and (existing := find_build(writer.out, key)):
            return existing
        return _Compile(writer, source, hashes, recipe, capability, key, phases, force).run(dataset, choice)


@dataclass(frozen=True)
class _Compile:
    """One compile, from the opened model to the committed build."""

    writer: BuildWriter
    source: Source
    hashes: ModelHashes
    recipe: Recipe
    capability: Capability
    key: str
    phases: PhaseTimer
    force: bool

    def run(self, dataset: Dataset | None, choice: ProfileChoice) -> Build:
        phases, folder = self.phases, self.writer.folder
        profile, profile_origin = choice.profile, choice.origin
        with phases("read the graph"):
            graph = self.source.graph()
            _check_ends(graph, self.source.origin)
            anatomy = find_anatomy(graph)
            if FFNStates() in to_measure(self.recipe.needs):
                require_ffns(anatomy)
            if dataset is not None:
                check_inputs(dataset, self.source, graph.inputs, self.recipe.calibration.max_tokens)
            positions = find_positions(graph)
            workload = self.recipe.workload.fitting(positions.most if positions else None)
            workload.check_dims(graph)
            check_sizes("workload.tokens", workload.tokens[0], workload.past[0], positions)
            if self.recipe.check:
                corners(graph, workload)  # refuses a workload without any call that the model takes
            max_tokens = _shorter(self.source.max_tokens, positions)
            _check_suited(self.recipe, find_task(graph.inputs, graph.outputs, self.source.head))
            cached = bool(pasts(tensor.name for tensor in graph.inputs))
            tokens = workload.tokens_of_call(cached=cached, fixed=anatomy.fixed_tokens)
            before = _sizes(graph, anatomy)
        with phases("look for NaN in the weights"):
            check_finite(_constants(graph), hint="the model is damaged, or its training diverged; use a sound one")
        if dataset is not None:
            with phases("calibrate", shown=False):
                profile = measured_profile(
                    self.source,
                    dataset,
                    self.recipe.calibration,
                    needs=self.recipe.needs,
                    progress=phases.progress,
                    again=self.force,
                )
                profile_origin = f"measured on {dataset.path.resolve()}"
        with scratch(folder):
            with phases("run the passes", shown=False):
                context = PassContext(
                    profile, self.capability, phases.progress, shards=self.recipe.shards,
                    tokens=tokens,
                    crossover=get_target(self.recipe.target).crossover(self.recipe.threads),
                )  # fmt: skip
                results = run_passes(graph, self.recipe.passes, context)
                # Weights that passes computed; all others were checked above.
                new_weights = [constant for constant in _constants(graph) if is_new(constant)]
                check_finite(new_weights, hint="the calibration data drive a pass out of range; try milder options")
                declared = workload.tokens[2] + workload.past[2]
                limit = None if max_tokens is None else max(max_tokens, declared)
                get_target(self.recipe.target).settle(graph, limit, self.recipe.shards)
                positions = positions or find_positions(graph)  # a table of rotary angles limits positions, too
            with phases("write the model"), self.writer.writing():
                models, shard_results = self._write(graph, profile)
                results += shard_results
        dials = tuple(context.dials.values())
        dials_and_path = Dials(dials, straight_path(dials))
        inputs = [TensorInfo.of(tensor) for tensor in graph.inputs if tensor.name not in context.dials]
        outputs = [TensorInfo.of(tensor) for tensor in graph.outputs]
        packed = [mask for tensor in graph.inputs if (mask := packed_mask(tensor))]
        sizes = Sizes(**before, compiled_bytes=_total(graph), compiled_ffn_bytes=_ffn_bytes(results, before))
        family = anatomy.family
        del graph, anatomy, new_weights
        phases.give_back()  # otherwise the weights stay in memory while the engine is built and run
        with phases("build the engine"), self.writer.writing(), self.writer.naming(self.source.origin):
            for model in models:
                options = self.recipe.engine
                get_target(self.recipe.target).build(
                    model, workload, folder / ENGINE, timeout_s=options.timeout_s, options=options
                )
        recipe = self.recipe.model_copy(update={"workload": workload})
        with phases("check the engine"), self.writer.naming(self.source.origin):
            check = self_check(self.source, sizes.dense_bytes, folder, recipe, inputs, dials_and_path)
        if self.source.hashes != self.hashes:
            raise ModelError(f"{self.source.origin}: its files changed while it was compiled", hint="compile it again")
        manifest = Manifest(
            key=self.key,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            origin=_origin(self.source),
            source=os.path.abspath(
                self.source.onnx
            ),  # links are not resolved: the files next to a link belong to the model
            graph=self.hashes.graph,
            fingerprint=self.hashes.weights,
            family=family,
            labels=self.source.labels,
            max_tokens=max_tokens,
            task=find_task(inputs, outputs, self.source.head),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            dials=dials_and_path.dials,
            speed=dials_and_path.path,
            positions=positions,
            packed=tuple(packed),
            target=self.recipe.target,
            shards=self.recipe.shards,
            capability=_plain(self.capability),
            recipe=recipe.model_dump(mode="json"),
            data=profile.info.data if profile else None,
            profile=profile_digest(profile) if profile else None,
            profile_origin=profile_origin,
            versions=package_versions(),
            passes=tuple(PassReport.of(result) for result in results),
            sizes=sizes,
            seconds=phases.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            check=check,
        )
        return self.writer.commit(manifest)

    def _write(self, graph: gs.Graph, profile: Profile | None) -> tuple[list[Path], list[PassResult]]:
        """Write all files but the engine; returns the ONNX files, and what was divided among shards."""
        folder = self.writer.folder
        (folder / MODEL).parent.mkdir()
        models, shard_results = [folder / MODEL], []
        if self.recipe.shards > 1:
            from trimtab.compiler.targets.sharded.plan import write_shards

            result, models = write_shards(graph, self.recipe.shards, folder)
            shard_results.append(result)
        else:
            repack(graph)
            save_graph(graph, folder / MODEL)
        (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
        if profile is not None:
            profile.save(folder / PROFILE)
        if self.source.tokenizer is not None:
            (folder / TOKENIZER).mkdir()
            for name in TOKENIZER_FILES:
                if (self.source.tokenizer / name).is_file():
                    shutil.copyfile(self.source.tokenizer / name, folder / TOKENIZER / name)
            read_preparation(self.source.tokenizer).write(folder / TOKENIZER)
        return models, shard_results


def _check_shards(recipe: Recipe) -> None:
    """Check, before any long phase, that the target can run shards and that their packages are installed."""
    if not get_target(recipe.target).divides:
        raise TargetError(
            f"target {recipe.target} does not run a model in {recipe.shards} shards", hint="choose --target onnxruntime"
        )
    from trimtab.compiler.targets.sharded.group import require_torch

    require_torch()


def check_fit(recipe: Recipe, capability: Capability) -> None:
    """Check that the target runs the graphs that the passes make, and supports the recipe's section `engine`.

    Raises:
        TargetError: the target does not.
    """
    for step in recipe.passes:
        reason = step.unfit(capability)
        if reason is not None:
            raise TargetError(
                f"target {recipe.target} cannot run what pass {step.name} makes: {reason}",
                hint="remove the pass, or choose --target onnxruntime",
            )
    if recipe.engine != EngineOptions() and not get_target(recipe.target).builds_engines:
        raise TargetError(
            f"engine: target {recipe.target} builds no engines, and ignores the section `engine`",
            hint="remove the section, or choose --target tensorrt-rtx",
        )
    packing = [step.name for step in recipe.passes if step.packs]
    if packing and (recipe.engine.segments or 1) > 1:
        raise TargetError(
            f"engine.segments: {recipe.engine.segments} engines, cut between layers, would pass on packed tokens, "
            f"whose number {packing[0]} counts at run time",
            hint="remove it, or set it to 1; a model that exits early has an engine up to each exit without it",
        )


def _check_suited(recipe: Recipe, task: Task | None) -> None:
    """Check that the passes suit the task of the model, which its files define; the graph alone does not."""
    for step in recipe.passes:
        reason = step.unsuited(task.kind if task is not None else None)
        if reason is not None:
            raise ModelError(f"pass {step.name}: {reason}", hint=f"remove {step.name} from the recipe")


def _check_ends(graph: gs.Graph, origin: str) -> None:
    """Refuse models that no call can be made of.

    Raises:
        ModelError: the model has no inputs or outputs, or has some of types that NumPy lacks.
    """
    for tensors, what in ((graph.inputs, "inputs"), (graph.outputs, "outputs")):
        if not tensors:
            raise ModelError(f"{origin}: has no {what}", hint="export a model that computes outputs from inputs")
        for tensor in tensors:
            if isinstance(tensor.dtype, int):  # graphsurgeon leaves ONNX's number where NumPy has no type
                kind = onnx.TensorProto.DataType.Name(tensor.dtype).lower()
                raise ModelError(
                    f"{origin}: {tensor.name!r}, one of its {what}, is {kind}, and NumPy has no such arrays",
                    hint="export the model with float32 or float16 at its ends; inside, any type goes",
                )


def _shorter(max_tokens: int | None, positions: Positions | None) -> int | None:
    """The length of the longest text that the model takes, by its files and its positions."""
    limits = (max_tokens, positions.most if positions is not None else None)
    return min((limit for limit in limits if limit is not None), default=None)


def _origin(source: Source) -> str:
    """The model's path, valid from any working directory, or the name of a torch model."""
    return source.origin if source.kind == "torch" else str(Path(source.origin).expanduser().resolve())


def _key(
    source: Source,
    hashes: ModelHashes,
    recipe: Recipe,
    capability: Capability,
    dataset: Dataset | None,
    profile: Profile | None,
) -> str:
    """The key of a build: a hash of all that decides what it contains.

    The ONNX file is hashed whole, and the fingerprint covers every byte of weights in external files.
    """
    parts = {
        "format": FORMAT,
        "versions": package_versions(),
        "graph": hashes.graph,
        "weights": hashes.weights,
        "labels": source.labels,
        "max_tokens": source.max_tokens,
        "head": asdict(source.head),
        "tokenizer": source.tokenizer_hashes,
        "recipe": recipe.canonical(),
        "capability": _plain(capability),
        "data": dataset.sha256 if dataset else None,
        "profile": profile_digest(profile) if profile else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain(capability: Capability) -> dict[str, Any]:
    return asdict(capability) | {"weight_bits": sorted(capability.weight_bits)}


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    return [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]


def _total(graph: gs.Graph) -> int:
    return sum(stored_bytes(constant) for constant in _constants(graph))


def _sizes(graph: gs.Graph, anatomy: Anatomy) -> dict[str, int]:
    """Bytes of the dense model; a weight that layers share counts once, because it is stored once."""
    ffn = distinct_bytes(linear for ffn in anatomy.ffns for linear in ffn.linears)
    return {"dense_bytes": _total(graph), "dense_ffn_bytes": ffn}


def _ffn_bytes(results: list[PassResult], before: dict[str, int]) -> int | None:
    """Bytes of the compiled FFN weights: the last pass that changed them reports them, as `ffn_bytes` in its details.

    None where they are unknown: `precision` narrows all weights, and does not distinguish FFNs from the rest.
    """
    ffn_bytes: int | None = None if any(result.changed for result in results) else before["dense_ffn_bytes"]
    for result in results:
        if result.changed and "ffn_bytes" in result.details:
            ffn_bytes = result.details["ffn_bytes"]
        elif result.name == Precision.name and result.changed:
            ffn_bytes = None
    return ffn_bytes
