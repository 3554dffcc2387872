"""The tape: tensors count while something refers to them, as storages do in torch."""

from __future__ import annotations

import gc

import pytest

from edgepeft.memory.operations import LinearPlan, Operations
from edgepeft.memory.tape import GRADIENTS, LOSS, RECOMPUTED, SAVED, Node, Tape, Tensor
from edgepeft.methods import LinearTerms


def operations(tape: Tape, *, compute_bytes: int = 4) -> Operations:
    return Operations(tape, tokens=1, compute_bytes=compute_bytes, angle_bytes=0, converts=False)


def live(tape: Tape) -> int:
    return sum(tape.live)


def trained_input(tape: Tape, size: int) -> Tensor:
    """A tensor that wants a gradient."""

    def back(node: Node) -> list[Tensor | None]:
        node.take()
        return []

    return Tensor(tape, size, tape.record_plain((), back))


def test_a_tensor_counts_until_its_last_reference_goes():
    tape = Tape("here")
    one = Tensor(tape, 100)
    alias = one
    Tensor(tape, 50)
    assert live(tape) == 100
    del one
    assert live(tape) == 100
    del alias
    assert live(tape) == 0
    tape.leave()
    assert tape.peaks[0].total == 150
    assert tape.peaks[0].place == "here"


def test_each_place_has_its_own_highest_point_by_category():
    tape = Tape("first")
    kept = Tensor(tape, 10)
    tape.touch(90)
    tape.enter("second")
    tape.category = LOSS
    tape.touch(5)
    tape.leave()
    assert [(peak.place, peak.total) for peak in tape.peaks] == [("first", 100), ("second", 15)]
    assert tape.peaks[1].by_category[SAVED] == kept.size
    assert tape.peaks[1].by_category[LOSS] == 5


def test_a_view_keeps_what_it_is_of():
    tape = Tape()
    tape.nodes = []
    ops = operations(tape)
    x = trained_input(tape, 64)
    view = ops.view(x, 64)
    del x
    assert live(tape) == 64
    del view
    assert live(tape) == 0


def test_what_backward_needs_lives_until_its_node_has_run():
    tape = Tape()
    tape.nodes = []
    ops = operations(tape)
    x = trained_input(tape, 8)
    out = ops.through(x, 8, 8, x)
    del x
    assert live(tape) == 16
    assert out.node is not None
    out.node.gradient = Tensor(tape, 8)
    del out
    tape.backward(lambda trained: None)
    assert live(tape) == 0


def test_gradients_that_meet_are_added_into_a_new_tensor():
    tape = Tape("forward")
    tape.nodes = []
    ops = operations(tape)
    x = trained_input(tape, 8)
    out = ops.add(x, ops.through(x, 8, 8))
    node = out.node
    assert node is not None
    del x, out
    tape.enter("backward")
    node.gradient = Tensor(tape, 8)
    del node
    tape.backward(lambda trained: None)
    tape.leave()
    # The residual's gradient, that of the branch, and their sum.
    assert tape.peaks[-1].total == 24


def test_without_gradients_nothing_is_kept():
    tape = Tape()
    ops = operations(tape)
    out = ops.linear(Tensor(tape, 8), linear_plan())
    assert out.node is None
    assert live(tape) == 20
    del out
    assert live(tape) == 0


def test_a_checkpointed_layer_keeps_its_input_and_forms_the_rest_again():
    def layer(x: Tensor) -> Tensor:
        return ops.linear(ops.linear(x, linear_plan()), linear_plan(in_bytes=20, out_bytes=8))

    peaks = {}
    for checkpointed in (False, True):
        tape = Tape("forward")
        tape.nodes = []
        ops = operations(tape)
        x = Tensor(tape, 8)
        out = tape.checkpointed(layer, x) if checkpointed else layer(x)
        del x
        held = live(tape)
        node = out.node
        assert node is not None
        node.gradient = Tensor(tape, 8)
        del out, node
        tape.category = RECOMPUTED
        gradients: list[Tensor] = []
        tape.backward(lambda trained, held=gradients: held.append(trained))
        peaks[checkpointed] = held
        assert [gradient.size for gradient in gradients] == [12, 12]
        gradients.clear()
        assert live(tape) == 0
    # Input and output; without checkpointing also what lies between, and both updates' own.
    assert peaks == {True: 16, False: 16 + 20 + 2 * 3}


def test_trained_gradients_can_be_renamed():
    tape = Tape()
    tensor = Tensor(tape, 7)
    tape.rename(tensor, GRADIENTS)
    assert tape.live == [0, 0, 0, 7]
    del tensor
    assert live(tape) == 0


@pytest.mark.parametrize("gain_bytes", [0, 40])
def test_a_norm_keeps_its_input_and_a_root_for_each_row(gain_bytes):
    tape = Tape()
    tape.nodes = []
    ops = operations(tape, compute_bytes=2)
    x = trained_input(tape, 20)
    out = ops.norm(x, 20, gain_bytes=gain_bytes)
    del x
    assert live(tape) == out.size + 20 + 4
    tape.nodes.clear()


def test_linears_with_one_input_keep_it_once_and_go_back_together():
    tape = Tape()
    tape.nodes = []
    ops = operations(tape, compute_bytes=2)
    x = trained_input(tape, 8)
    one, other = ops.linears(x, [linear_plan(), linear_plan(out_bytes=6)], None)
    del x
    assert live(tape) == one.size + other.size + 8 + 3 + 3
    seen = []
    for y in (one, other):
        assert y.node is not None
        y.node.gradient = Tensor(tape, y.size)
    del one, other, y
    tape.backward(lambda gradient: seen.append(gradient.size))
    assert seen == [12, 12]
    assert live(tape) == 0


def test_a_tape_leaves_no_cycles_behind():
    gc.collect()
    gc.disable()
    try:
        test_a_checkpointed_layer_keeps_its_input_and_forms_the_rest_again()
        assert not [found for found in gc.get_objects() if isinstance(found, Tensor)]
    finally:
        gc.enable()


def linear_plan(in_bytes: int = 8, out_bytes: int = 20) -> LinearPlan:
    update = LinearTerms(parameters=3, kept_bytes=3)
    return LinearPlan(in_bytes=in_bytes, out_bytes=out_bytes, scratch_bytes=0, update=update)
