"""The oracle and the models that everything else is tested with: are they any good?"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from helpers.cases import Branch, Case, random_rows, run_trajectory
from helpers.models import CASES
from helpers.oracle import Oracle
from helpers.tolerances import excess, tolerance

STEPS = 8
DTYPES = [torch.float32, torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def oracle_trajectory(
    case: Case, dtype: torch.dtype, rows: dict[str, list[int]], steps: int = STEPS, streams: int = 1
) -> list[Tensor]:
    with Oracle(case.build(0, dtype), case.branches, rows) as oracle:
        return run_trajectory(case, oracle.model, steps=steps, seed=1, dtype=dtype, streams=streams, around=oracle.step)


@each_dtype
@each_case
def test_computing_everything_is_the_plain_model_bit_for_bit(case, dtype):
    plain = run_trajectory(case, case.build(0, dtype), steps=STEPS, seed=1, dtype=dtype)
    ones = {site: [1] * STEPS for site in case.branches}
    for rows in ({}, ones):
        assert all(map(torch.equal, plain, oracle_trajectory(case, dtype, rows)))


@each_dtype
@each_case
def test_activations_stay_sane(case, dtype):
    outputs = run_trajectory(case, case.build(0, dtype), steps=STEPS, seed=1, dtype=dtype)
    for output in outputs:
        assert output.dtype == dtype
        assert 0.3 < float(output.float().std()) < 3
    for before, after in itertools.pairwise(outputs):
        assert not torch.equal(before, after)


@each_case
def test_each_branch_matters(case):
    """Negating a branch's output (which no norm behind it undoes) changes the model's by 5% of its size."""
    latents, (conditioning,) = case.inputs(1, torch.float32)
    model = case.build()
    with torch.no_grad():
        plain = case.call(model, latents, 0.9, conditioning)
        for site, branch in case.branches.items():
            calls = []

            def negate(module, args, output, calls=calls, branch=branch):
                calls.append(1)
                if len(calls) - 1 != branch.call:
                    return output
                return tuple(-part for part in output) if isinstance(output, tuple) else -output

            handle = model.get_submodule(branch.module).register_forward_hook(negate)
            changed = case.call(model, latents, 0.9, conditioning)
            handle.remove()
            assert float((changed - plain).abs().max()) > 5e-2 * float(plain.std()), site


@each_dtype
@each_case
def test_a_single_wrong_decision_is_seen(case, dtype):
    """The tolerance is tight: one branch reused once puts the trajectory far outside of it."""
    right = oracle_trajectory(case, dtype, {}, steps=2)
    for site in case.branches:
        wrong = oracle_trajectory(case, dtype, {site: [1, 0]}, steps=2)
        assert torch.equal(wrong[0], right[0])
        assert excess(wrong[1], right[1], tolerance(dtype)) > 1000, site


def test_a_stale_value_is_seen(case=CASES["adaln_zero"]):
    """Reading the output of two computed steps ago, in place of the last, is far outside of the tolerance."""
    rows = {site: [1, 1, 0] for site in case.branches}
    right = oracle_trajectory(case, torch.float32, rows, steps=3)
    stale = oracle_trajectory(case, torch.float32, {**rows, "blocks.1.attn": [1, 0, 0]}, steps=3)
    assert excess(stale[2], right[2], tolerance(torch.float32)) > 1000


@each_case
def test_reused_modules_do_not_run(case):
    _, rows = random_rows(list(case.branches), STEPS, seed=3)
    with Oracle(case.build(), case.branches, rows) as oracle:
        for seed in (1, 2):
            run_trajectory(case, oracle.model, steps=STEPS, seed=seed, dtype=torch.float32, around=oracle.step)
    assert oracle.calls == {site: 2 * sum(row) for site, row in rows.items()}


class Doubler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return 2 * x


class Twice(nn.Module):
    """A module that is called twice and whose output is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Doubler()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).add_(1) + 10 * self.inner(x + 1).add_(1)


FIRST, SECOND = Branch("inner", "ffn", 1), Branch("inner", "ffn", 1, call=1)


def test_each_call_of_a_module_has_a_cache_and_a_row_of_its_own():
    model = Twice()
    one, three = torch.tensor(1.0), torch.tensor(3.0)
    with Oracle(model, {"a": FIRST, "b": SECOND}, {"a": [1, 0, 0], "b": [1, 1, 0]}) as oracle:
        expected = [(one, 3 + 10 * 5), (three, 3 + 10 * 9), (one, 3 + 10 * 9)]
        for step, (x, value) in enumerate(expected):
            with oracle.step(step):
                assert model(x) == value
    assert oracle.calls == {"a": 1, "b": 2} and model.inner.runs == 3
    assert model(one) == 3 + 10 * 5, "closing the oracle gives the forward back"


def test_each_stream_has_a_cache_of_its_own():
    model = Twice()
    with Oracle(model, {"a": FIRST, "b": SECOND}, {"a": [1, 0], "b": [1, 0]}) as oracle:
        for step in range(2):
            for stream in range(2):
                with oracle.step(step, stream):
                    x = torch.tensor(float(stream + 10 * step))
                    assert model(x) == 2 * stream + 1 + 10 * (2 * (stream + 1) + 1)


def test_tuples_are_kept():
    class Pair(Doubler):
        def forward(self, x):
            return super().forward(x), x - 1

    model = nn.Sequential(Pair())
    with Oracle(model, {"pair": Branch("0", "attn", 1, outputs=2)}, {"pair": [1, 0]}) as oracle:
        for step in range(2):
            with oracle.step(step):
                assert model(torch.tensor(4.0 + step)) == (8.0, 3.0)


def test_a_new_trajectory_keeps_nothing():
    model = Twice()
    with Oracle(model, {"a": FIRST, "b": SECOND}, {"a": [1, 0]}) as oracle:
        for x, value in ((1.0, 3.0), (5.0, 11.0)):
            for step in range(2):
                with oracle.step(step):
                    model(torch.tensor(x))
                assert oracle._kept["a", 0] == [(0.0, value - 1)]


def test_misuse_of_the_oracle_raises():
    with pytest.raises(ValueError, match="first step"):
        Oracle(Twice(), {"a": FIRST, "b": SECOND}, {"a": [0, 1]})
    with pytest.raises(ValueError, match="the branches are"):
        Oracle(Twice(), {"a": FIRST, "b": SECOND}, {"c": [1, 1]})
    with pytest.raises(ValueError, match="same call"):
        Oracle(Twice(), {"a": FIRST, "b": FIRST}, {})
    with Oracle(Twice(), {"a": FIRST, "b": SECOND}, {}) as oracle:
        with pytest.raises(RuntimeError, match="inside oracle.step"):
            oracle.model(torch.tensor(1.0))
        with pytest.raises(ValueError, match="has an oracle already"), Oracle(oracle.model, {"a": FIRST}, {}):
            pass
    with (
        Oracle(Twice(), {"a": FIRST}, {}) as oracle,
        pytest.raises(RuntimeError, match="no site's"),
        oracle.step(0),
    ):
        oracle.model(torch.tensor(1.0))
    third = Branch("inner", "ffn", 1, call=2)
    with (
        Oracle(Twice(), {"a": FIRST, "b": SECOND, "c": third}, {}) as oracle,
        pytest.raises(RuntimeError, match=r"without a call of \['c'\]"),
        oracle.step(0),
    ):
        oracle.model(torch.tensor(1.0))
