"""``compile`` and what undoes it; bad input, by the message."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import smoothcache_fx as smoothcache
from helpers.capture import Stack, inputs
from helpers.cases import randomize
from smoothcache_fx import CompiledError, NoSitesError, Schedule, ScheduleError, StepError

SCHEDULE = Schedule(3, {"attn": [1, 0, 0], "ffn": [1, 0, 1]})


@pytest.fixture
def model():
    return randomize(Stack(), 0).eval()


class Timed(nn.Module):
    """A stack whose forward takes a timestep."""

    def __init__(self):
        super().__init__()
        self.stack = Stack()

    def forward(self, x, timestep):
        return self.stack(x, timestep.view(-1, 1).expand(len(x), 16))


def run(model, steps):
    with torch.no_grad():
        return [model(*inputs()) for _ in range(steps)]


def test_it_returns_the_same_object_and_touches_only_forward(model):
    names, kind = list(model.state_dict()), type(model)
    assert smoothcache.compile(model, SCHEDULE, backend="eager") is model
    assert list(model.state_dict()) == names and type(model) is kind
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Stack().named_modules()]


def test_methods_that_call_forward_are_cached_too():
    class Guided(Stack):
        def forward_with_cfg(self, x, c):
            return self.forward(torch.cat((x, x)), torch.cat((c, 0 * c))).chunk(2)

    model = smoothcache.compile(randomize(Guided(), 0).eval(), SCHEDULE, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            model.forward_with_cfg(*inputs())
    assert [group.reused for group in smoothcache.report(model).groups] == [4, 2]


def test_remove_gives_everything_back(model):
    x, c = inputs()
    with torch.no_grad():
        before = model(x, c)
    smoothcache.compile(model, SCHEDULE, backend="eager")
    run(model, 2)
    session = model.forward.session
    assert smoothcache.remove(model) is model
    assert "forward" not in model.__dict__ and not session.programs
    with torch.no_grad():
        assert torch.equal(model(x, c), before)
    smoothcache.compile(model, SCHEDULE, backend="eager")  # and it can be compiled again


def _held(model):
    """Weak references to all that a compiled model has made: caches, and what variants run."""
    (program,) = model.forward.session.programs
    streams = [stream for binding in program.bindings for stream in binding.streams.values()]
    buffers = [buffer for stream in streams for buffer in stream.buffers if buffer is not None]
    variants = program.dispatcher.variants.values()
    assert buffers and variants
    return [*map(weakref.ref, buffers), *map(weakref.ref, variants)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_remove_frees_caches_and_variants(model, backend):
    smoothcache.compile(model, SCHEDULE, backend=backend)
    run(model, 2)
    held = _held(model)
    smoothcache.remove(model)
    gc.collect()
    assert not [reference() for reference in held if reference() is not None]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_is_let_go_takes_everything_along(backend):
    model = randomize(Stack(), 0).eval()
    smoothcache.compile(model, SCHEDULE, backend=backend)
    run(model, 2)
    held = [weakref.ref(model), *_held(model)]
    del model
    gc.collect()
    assert not [reference() for reference in held if reference() is not None]


def test_remove_gives_back_a_forward_that_someone_else_had_put_there(model):
    inner = type(model).forward

    def hooked(x, c):
        return inner(model, x, c) + 1

    model.forward = hooked
    x, c = inputs()
    with torch.no_grad():
        before = model(x, c)
    smoothcache.compile(model, SCHEDULE, backend="eager")
    with torch.no_grad():
        assert torch.equal(model(x, c), before)
    smoothcache.remove(model)
    assert model.__dict__["forward"] is hooked


def test_disabled_runs_the_original_and_leaves_the_step(model):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    run(model, 1)
    plain = Stack()
    plain.load_state_dict(model.state_dict())
    x, c = inputs()
    with torch.no_grad():
        with smoothcache.disabled(model):
            assert torch.equal(model(x, c), plain(x, c))
        assert not torch.equal(model(x, c), plain(x, c)), "step 1 reuses"
    assert smoothcache.report(model).calls == 2


def test_reset_begins_a_trajectory(model):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    run(model, 2)
    smoothcache.reset(model)
    plain = Stack()
    plain.load_state_dict(model.state_dict())
    x, c = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(x, c), plain(x, c))
    assert smoothcache.report(model).trajectories == 2


def test_two_models_of_one_class_do_not_share_anything():
    models = [randomize(Stack(), seed).eval() for seed in range(10)]
    plain = [copy.deepcopy(model) for model in models]
    for model in models:
        smoothcache.compile(model, SCHEDULE, backend="eager")
    for _ in range(3):
        x, c = inputs()
        outputs = [model(x, c) for model in models]
    for model, reference, output in zip(models, plain, outputs, strict=True):
        assert smoothcache.report(model).calls == 3
        assert not torch.equal(output, reference(x, c))
        assert smoothcache.report(model).variants == 3


def test_a_call_that_dynamo_does_not_compile_is_told(model, caplog):
    smoothcache.compile(model, SCHEDULE, backend="eager", dynamic=False)
    run(model, 1)
    with torch.compiler.set_stance("force_eager"):
        run(model, 2)
    report = smoothcache.report(model)
    assert report.uncompiled_calls == 2 and "2 of the calls ran uncached" in str(report)
    assert sum("ran Stack uncompiled and so uncached" in record.message for record in caplog.records) == 1


# Bad input.


def test_compiled_twice(model):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    with pytest.raises(CompiledError, match="Stack is compiled already: call smoothcache.remove"):
        smoothcache.compile(model, SCHEDULE)


def test_wrapped_by_torch_compile(model):
    with pytest.raises(CompiledError, match="_orig_mod"):
        smoothcache.compile(torch.compile(model, backend="eager"), SCHEDULE)
    model.compile(backend="eager")
    with pytest.raises(CompiledError, match=r"model.compile\(\) was called"):
        smoothcache.compile(model, SCHEDULE)


def test_training_mode(model):
    """Told where it is compiled, and where it is called."""
    for refused in (
        lambda: smoothcache.compile(model.train(), SCHEDULE, backend="eager"),
        lambda: smoothcache.compile(model.eval(), SCHEDULE, backend="eager").train()(*inputs()),
    ):
        with pytest.raises(CompiledError, match="training mode.*model.eval"):
            refused()


def test_gradients_on_an_input(model):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    x, c = inputs()
    with pytest.raises(CompiledError, match="input 1 requires gradients"):
        model(x, c.requires_grad_())
    with pytest.raises(CompiledError, match="input 'c' requires gradients"):
        model(x, c=c)


def test_kinds_that_the_model_lacks_are_no_error_but_only_such_are(model):
    smoothcache.compile(model, Schedule.uniform(3, 3), backend="eager")
    run(model, 1)
    other = smoothcache.compile(randomize(Stack(), 0).eval(), Schedule(3, {"cross_attn": [1, 0, 0]}), backend="eager")
    with pytest.raises(ScheduleError, match="'cross_attn', but the model has no such site"):
        other(*inputs())


def test_more_and_fewer_steps_than_the_schedule(caplog):
    more = smoothcache.compile(randomize(Timed(), 0).eval(), SCHEDULE, backend="eager")
    x, _ = inputs()
    for t in (1.0, 0.8, 0.6, 0.4):
        more(x, torch.full((2,), t))
    with pytest.raises(StepError, match="schedule's 3 steps: it goes on after 3 steps"):
        more(x, torch.full((2,), 0.2))
    fewer = smoothcache.compile(randomize(Timed(), 0).eval(), SCHEDULE, backend="eager")
    for t in (1.0, 0.5):
        fewer(x, torch.full((2,), t))
    assert "began anew" not in caplog.text
    smoothcache.remove(more)  # it has the same weights
    with torch.no_grad():
        expected = more(x, torch.full((2,), 1.0))
    assert torch.equal(fewer(x, torch.full((2,), 1.0)), expected), "a new trajectory"
    assert "the sampler began anew after 2 steps, but the schedule has 3 steps" in caplog.text


def test_no_site_says_what_was_looked_at():
    class NoBranch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, c):
            return x + 0.1 * x * x + self.linear(c)[:, None]

    model = smoothcache.compile(NoBranch().eval(), SCHEDULE, backend="eager")
    with pytest.raises(NoSitesError) as error:
        model(*inputs())
    message = str(error.value)
    assert "NoBranch has no residual branch" in message
    assert "no matmul, convolution or opaque op" in message and "test_compiler.py" in message
    linear = smoothcache.compile(nn.Sequential(nn.Linear(4, 4)).eval(), SCHEDULE, backend="eager")
    with pytest.raises(NoSitesError, match="no add of two tensors was found"):
        linear(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": [1, 0]}, TypeError, "schedule must be a smoothcache Schedule, got list"),
        ({"calls_per_step": 0}, ValueError, "calls_per_step is 0, expected a whole number"),
        ({"backend": "no_such_backend"}, Exception, "no_such_backend"),
        ({"backend": "smoothcache"}, ValueError, "cannot be 'smoothcache' itself"),
        ({"backend": torch.compile}, TypeError, "name of an inner compiler"),
        ({"mode": "max-autotune", "options": {"max_autotune": True}}, ValueError, "either mode or options"),
        ({"options": {"no_such_option": 1}}, RuntimeError, "no_such_option"),
        ({"mode": "fastest"}, RuntimeError, "fastest"),
    ],
)
def test_arguments_that_do_not_fit(model, arguments, error, message):
    with pytest.raises(error, match=message):
        smoothcache.compile(model, **{"schedule": SCHEDULE, **arguments})
    assert "forward" not in model.__dict__


def test_something_that_is_no_module():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        smoothcache.compile(lambda x: x, SCHEDULE)


def test_fullgraph_is_handed_on():
    model = smoothcache.compile(Stack(broken=True).eval(), SCHEDULE, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(*inputs())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_guard_filter_is_dynamos(model, backend):
    guards = []

    def keep_all(entries):
        guards.extend(entries)
        return [True] * len(entries)

    options = {"guard_filter_fn": keep_all}
    smoothcache.compile(model, Schedule(2, {"attn": [1, 0]}), backend=backend, options=options)
    with torch.no_grad():
        model(*inputs())
    assert guards and options == {"guard_filter_fn": keep_all}, "as it was given"


def test_copies_and_pickles_are_refused(model):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    with pytest.raises(CompiledError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(CompiledError, match="cannot be pickled"):
        pickle.dumps(model)


# The compiled model in the hands of other compilers.


@pytest.mark.parametrize(
    "export",
    [
        lambda model, inputs: torch.export.export(model, inputs, strict=True),
        lambda model, inputs: torch.export.export(model, inputs, strict=False),
        torch.jit.trace,
        lambda model, inputs: torch.jit.script(model),
    ],
    ids=["export", "export_not_strict", "jit_trace", "jit_script"],
)
def test_what_cannot_be_done_with_a_compiled_model_names_remove(model, export):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    run(model, 3)
    with pytest.raises(Exception, match=r"smoothcache\.remove\(model\)"):
        export(model, inputs())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compile_on_top_changes_nothing(model, fullgraph):
    smoothcache.compile(model, SCHEDULE, backend="eager")
    torch.manual_seed(0)
    expected = run(model, 3)
    torch.manual_seed(0)
    found = run(torch.compile(model, backend="eager", fullgraph=fullgraph), 3)
    assert all(map(torch.equal, found, expected))
    report = smoothcache.report(model)
    assert report.uncompiled_calls == 0 and not report.forced


class Packed(nn.Parameter):
    """Like GGUF's: what is computed of one is one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return torch.Tensor._make_subclass(cls, result) if isinstance(result, torch.Tensor) else result


class PackedLinear(nn.Linear):
    def forward(self, x):
        weight = torch.Tensor._make_subclass(torch.Tensor, self.weight)
        return nn.functional.linear(x, weight * 0.5, self.bias)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_weights_of_a_subclass_with_a_torch_function(model, backend):
    for block in model.blocks:
        old = block.mlp[0]
        block.mlp[0] = PackedLinear(old.in_features, old.out_features)
        block.mlp[0].weight = Packed(old.weight.data, requires_grad=False)
    torch.manual_seed(0)
    plain = run(model, 1)
    smoothcache.compile(model, SCHEDULE, backend=backend)
    torch.manual_seed(0)
    outputs = run(model, 3)
    assert {type(output) for output in outputs} == {torch.Tensor}
    torch.testing.assert_close(outputs[0], plain[0])
    report = smoothcache.report(model)
    assert report.mac_ratio > 1.2 and not report.forced and report.graphs == 1
