"""What is compared, and how."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import zoo
from torch import Tensor

from trimtab.compiler.task import find_task
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassContext
from trimtab.passes.graph import load_graph
from trimtab.training.losses import divergence, relative_error
from trimtab.training.recover.objective import Objective, find_objective


def objective_of(family: str) -> tuple[Objective, object]:
    graph = load_graph(zoo.exported(family))
    Canonicalize().run(graph, PassContext())
    return find_objective(graph, graph, find_anatomy(graph)), graph


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_block_hands_on_one_state(family: str) -> None:
    objective, graph = objective_of(family)
    assert len(set(objective.states)) == len(find_anatomy(graph).ffns) > 0


def test_state_behind_post_norm_is_the_norm_and_behind_pre_norm_the_sum() -> None:
    for family, ops in (("bert", {"LayerNormalization"}), ("gpt2", {"Add"})):
        objective, graph = objective_of(family)
        made_by = {graph.tensors()[name].inputs[0].op for name in objective.states[:-1]}
        assert made_by == ops


@pytest.mark.parametrize(
    ("family", "logits", "vectors"),
    [("bert", ("logits",), ()), ("llama", ("logits",), ()), ("distilbert", (), ("last_hidden_state",))],
)
def test_logits_and_vectors_are_told_apart(family: str, logits: tuple[str, ...], vectors: tuple[str, ...]) -> None:
    objective, _ = objective_of(family)
    assert (objective.logits, objective.vectors) == (logits, vectors)


def test_embeddings_alone_are_compared_where_they_are_the_task() -> None:
    graph = load_graph(zoo.exported("distilbert"))
    Canonicalize().run(graph, PassContext())
    states = graph.outputs[0]
    states.shape = ("batch", "tokens", 32)
    pooled = gs.Variable("sentence_embedding", np.float32, ("batch", 32))
    graph.nodes.append(gs.Node("ReduceMean", inputs=[states], outputs=[pooled], attrs={"axes": [1], "keepdims": 0}))
    graph.outputs.append(pooled)
    anatomy, task = find_anatomy(graph), find_task(graph.inputs, graph.outputs)
    objective = find_objective(graph, graph, anatomy, task)
    assert objective.vectors == (pooled.name,)
    assert len(set(objective.states)) == len(anatomy.ffns)
    assert set(find_objective(graph, graph, anatomy).vectors) == {states.name, pooled.name}


def test_tensors_that_the_student_lost_are_left_out() -> None:
    objective, graph = objective_of("bert")
    student = graph.copy()
    student.tensors()[objective.states[1]].name = "renamed"
    less = find_objective(graph, student, find_anatomy(graph))
    assert objective.states[1] not in less.states
    assert set(less.states) < set(objective.states) | set(graph.tensors())


def tensors(states: int = 5) -> dict[str, Tensor]:
    return {"logits": torch.randn(3, 4, 6), "v": torch.randn(3, 8), "s": torch.randn(3, 4, states)}


@pytest.mark.parametrize("objective", [Objective(("logits",), (), ("s",), 2.0), Objective((), ("v",), ("s",))])
def test_loss_is_zero_for_the_teacher_itself_and_positive_for_others(objective: Objective) -> None:
    teacher = tensors()
    assert objective.loss(teacher, teacher, None).item() == pytest.approx(0, abs=1e-6)
    assert objective.agreement(teacher, teacher, None).item() == pytest.approx(1)
    assert objective.loss(tensors(), teacher, None).item() > 0.1


def test_padding_counts_for_nothing() -> None:
    objective = Objective(("logits",), (), ("s",))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    student, teacher = tensors(), tensors()
    loss = objective.loss(student, teacher, mask)
    noise = {
        name: value + 100 * torch.randn_like(value) * (1 - mask[..., None])
        for name, value in student.items()
        if name != "v"
    }
    torch.testing.assert_close(objective.loss(noise, teacher, mask), loss)
    flat = [{name: value.reshape(12, -1) for name, value in side.items() if name != "v"} for side in (student, teacher)]
    torch.testing.assert_close(objective.loss(*flat, mask), loss)
    assert objective.loss(noise, teacher, None) > loss


def test_formulas() -> None:
    a, b = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    p, q = torch.softmax(b.float() / 3, -1), torch.softmax(a.float() / 3, -1)
    torch.testing.assert_close(divergence(a, b, 3.0), 9 * (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)
    expected = (a - b).square().sum(-1) / b.square().sum(-1)
    torch.testing.assert_close(relative_error(a, b).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(relative_error(1000 * a, 1000 * b), relative_error(a, b), rtol=1e-4, atol=1e-5)
