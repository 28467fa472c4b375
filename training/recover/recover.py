"""recover: a short distillation of a rewritten model from its dense original.

Outputs are compared as in Hinton et al. 2015 ("Distilling the knowledge in a neural network"), the blocks' states as in
Jiao et al. 2020 ("TinyBERT", equation 8, scaled per token).
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.data import Dataset, check_inputs, with_labels
from trimtab.compiler.progress import Progress
from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.compiler.task import Task, find_task
from trimtab.passes import PassContext, run_passes
from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.contract import Capability, first_rounding
from trimtab.passes.errors import DataError, ModelError
from trimtab.passes.profile import Profile
from trimtab.passes.recover import origin_of
from trimtab.training.recover.distill import Distillation
from trimtab.training.recover.objective import Objective, find_objective
from trimtab.training.recover.settings import Settings
from trimtab.training.recover.trainer import METHOD, check_recipe
from trimtab.training.samples import NO_LABEL, read_samples
from trimtab.training.torch_graph import learnable


def recover(
    source: Source, recipe: Recipe, dataset: Dataset, profile: Profile, settings: Settings, *,
    capability: Capability | None = None, progress: Progress | None = None,
) -> Profile:  # fmt: skip
    """Train the model after the recipe's passes before `recover` to reproduce the dense model's outputs.

    If a pass after `recover` rounds the operands of products, the student is trained with rounded operands.

    Args:
        dataset: training data; labels are read only with a weight. 5 % of it, at most 512 samples, are held out. The
            weights with the best held-out result are returned, which may be the initial ones.
        profile: the Profile that those passes need. It is not changed.
        capability: capability of the target at compile time.
        progress: called with (what, done, total).

    Returns:
        `profile` with the learned initializers.

    Raises:
        RecipeError: no `recover` in the recipe.
        ModelError: an operator that training does not know.
        DataError: the data do not fit the model.
        TrimtabError: training diverged.
    """
    start = time.monotonic()
    context = PassContext(profile, capability or Capability(), progress)
    dense = source.graph()
    check_inputs(dataset, source, with_labels(dataset, dense.inputs), settings.max_tokens)
    student = student_graph(source, recipe, context)  # which may search for long
    anatomy = find_anatomy(dense)
    task = find_task(dense.inputs, dense.outputs, source.head)
    objective = find_objective(
        dense, student, anatomy, task, temperature=settings.temperature, states_weight=settings.states_weight,
        labels_weight=settings.labels_weight,
    )  # fmt: skip
    rng = np.random.default_rng(settings.seed)
    samples = read_samples(
        dataset, source, dense.inputs, max_tokens=settings.max_tokens, rng=rng,
        task=_labelled(task) if settings.labels_weight else None, width=_width(dense, objective),
    )  # fmt: skip
    if settings.labels_weight:
        _check_labels(samples.labels, dataset, _width(dense, objective), objective)
    names = trained_names(dense, student, anatomy, settings.train)
    origin = origin_of(student, names, context.done)
    rounding = first_rounding(recipe.passes[check_recipe(recipe) + 1 :], context.capability)
    distillation = Distillation(dense, student, names, objective, samples, settings, rounding)
    record = distillation.run(rng, start, progress)
    learned = distillation.student.learned()
    record = settings.model_dump() | record  # whose steps are those that were made
    record |= {"data": dataset.sha256, "from": origin, "rounding": rounding and asdict(rounding)}
    info = profile.info.model_copy(
        update={
            "choices": profile.info.choices | context.choices,
            "learned": profile.info.learned | {METHOD: record},
        }
    )
    kept = {name: value for name, value in profile.tensors.items() if not name.startswith(f"learned.{METHOD}.")}
    return Profile(info, kept | {f"learned.{METHOD}.{name}": value for name, value in learned.items()})


def student_graph(source: Source, recipe: Recipe, context: PassContext) -> gs.Graph:
    """The graph as `recover` will find it: after the recipe's passes before it."""
    graph = source.graph()
    run_passes(graph, recipe.passes[: check_recipe(recipe)], context)
    return graph


def trained_names(dense: gs.Graph, student: gs.Graph, anatomy: Anatomy, train: Literal["all", "ffn"]) -> list[str]:
    """Initializers of `student` to train. Those of FFNs are what the dense FFNs had, and what passes have made instead.

    Args:
        anatomy: of `dense`.
    """
    names = learnable(student)
    if train == "all":
        return names
    ffn = {t.name for f in anatomy.ffns for linear in f.linears for t in (linear.weight, linear.bias) if t is not None}
    there = dense.tensors()
    return [name for name in names if name in ffn or name not in there]


def _labelled(task: Task | None) -> Task:
    """`task`, if it is one that labels can teach.

    Raises:
        ModelError: it is not.
    """
    if task is None or task.kind not in ("classes", "labels", "score"):
        raise ModelError(
            "labels can weigh in the loss of classifiers and scores alone, and this model is neither",
            hint="leave --labels-weight out",
        )
    return task


def _width(dense: gs.Graph, objective: Objective) -> int | None:
    """Logits of a sample, where the graph says."""
    shape = dense.tensors()[objective.logits[0]].shape if objective.logits else None
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _check_labels(labels: np.ndarray, dataset: Dataset, width: int | None, objective: Objective) -> None:
    if not (labels != NO_LABEL).any() or np.isnan(labels).all():
        raise DataError(f"{dataset.path}: no sample has a label", hint="give labelled data, or no weight to labels")
    if labels.ndim == 1 and width is not None and labels.max() >= width:
        raise DataError(
            f"{dataset.path}: label {labels.max()} lies outside 0..{width - 1}, the model's classes",
            hint="number the classes from 0 as the model does",
        )
    if labels.ndim == 2 and objective.activation == "sigmoid" and (np.nanmin(labels) < 0 or np.nanmax(labels) > 1):
        raise DataError(
            f"{dataset.path}: labels from {np.nanmin(labels):g} to {np.nanmax(labels):g}, and the model gives 0 to 1",
            hint="give scores from 0 to 1, or no weight to labels",
        )
