"""The scheduler tells the step: solvers, image-to-image, interrupted runs, other schedulers, other numbers of steps."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch

import smoothcache_fx as smoothcache
from smoothcache_fx import CompiledError, Schedule, StepError
from smoothcache_fx.compiled.forward import compiled_forward

from .build import CASES, cogvideox_v2v, dit, embeds, run, sd3, sd3_img2img, tiny_t5, video_arguments
from .eager_cache import cached_by_hand
from .test_runs import difference

DIT, SD3 = CASES["dit_ddim"], CASES["sd3"]
STEPS = 6
ROWS = {"attn": [1, 0, 1, 0, 0, 1], "ffn": [1, 1, 0, 0, 1, 0]}
SCHEDULE = Schedule(STEPS, ROWS)


def compiled(pipe, schedule=SCHEDULE):
    return smoothcache.compile(pipe, schedule, backend="eager")


@pytest.fixture
def pipe():
    return dit()


@pytest.fixture
def expected(pipe):
    with cached_by_hand(DIT, pipe, ROWS):
        return run(DIT, pipe, STEPS)


# Solvers.


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.HeunDiscreteScheduler, 7),  # 4 inference steps, two timesteps each but for the last
        (diffusers.KDPM2DiscreteScheduler, 7),
        (diffusers.PNDMScheduler, 4 + 9),
        (diffusers.DPMSolverSinglestepScheduler, 4),
        (diffusers.EulerAncestralDiscreteScheduler, 4),
        (diffusers.UniPCMultistepScheduler, 4),
        (diffusers.LCMScheduler, 4),
        (diffusers.DDPMScheduler, 4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_each_timestep_of_a_solver_is_a_step(scheduler, steps):
    pipe = dit()
    pipe.scheduler = scheduler()
    rows = {"attn": [index % 3 == 0 for index in range(steps)], "ffn": [index % 2 == 0 for index in range(steps)]}
    plain = run(DIT, pipe, 4)
    assert len(pipe.scheduler.timesteps) == steps
    with cached_by_hand(DIT, pipe, rows):
        expected = run(DIT, pipe, 4)
    compiled(pipe, Schedule(steps, rows))
    for _ in range(2):
        assert difference(run(DIT, pipe, 4), expected) <= 1e-5
    assert difference(plain, expected) >= 1e-3
    report = smoothcache.report(pipe)
    assert report.steps == 2 * steps and not report.forced


# Image to image.


@pytest.mark.parametrize("name", ["begin_index", "no_index"])
def test_image_to_image_begins_at_a_later_step(name):
    begin = 2  # of six steps the last four are run
    rows = {"attn": [1, 0, 1, 0, 0, 1], "ffn": [1, 1, 1, 0, 1, 0]}
    if name == "begin_index":
        image = embeds(1, 3, 32, 32).clamp(-1, 1) / 2 + 0.5
        arguments = {"image": image, "strength": 0.66}
        case, pipe = SD3, sd3_img2img()
    else:  # DDIM keeps no index: the first timestep tells
        case, pipe = CASES["cogvideox"], cogvideox_v2v()
        video = list(embeds(5, 3, 32, 32).clamp(-1, 1) / 2 + 0.5)
        case = type(case)(case.make, lambda: video_arguments(video=video), case.branches)
        arguments = {"strength": 0.67}
    plain = run(case, pipe, STEPS, **arguments)
    with cached_by_hand(case, pipe, rows, begin):
        expected = run(case, pipe, STEPS, **arguments)
    compiled(pipe, Schedule(STEPS, rows))
    for _ in range(2):
        assert difference(run(case, pipe, STEPS, **arguments), expected) <= 1e-5
    assert difference(plain, expected) >= 1e-3
    report = smoothcache.report(pipe)
    assert report.steps == 8
    assert set(report.forced) <= {"no value in this trajectory yet, at step 2"}


# Runs that end early, and other numbers of steps.


class Stop(Exception):
    pass


def interrupt(pipe, step, timestep, values):
    pipe._interrupt = step == 2
    return values


def fail(pipe, step, timestep, values):
    if step == 2:
        raise Stop
    return values


@pytest.mark.parametrize("callback", [interrupt, fail])
def test_after_an_interrupted_run_the_next_starts_clean(callback):
    pipe = sd3()
    with cached_by_hand(SD3, pipe, ROWS):
        expected = run(SD3, pipe, STEPS)
    compiled(pipe)
    try:
        run(SD3, pipe, STEPS, seed=2, callback_on_step_end=callback)
    except Stop:
        assert callback is fail
    assert smoothcache.report(pipe).steps == 3
    assert difference(run(SD3, pipe, STEPS), expected) <= 1e-5
    assert not smoothcache.report(pipe).forced


def test_a_callback_that_changes_latents_sees_every_step():
    pipe, seen = compiled(sd3()), []
    run(SD3, pipe, STEPS, callback_on_step_end=lambda pipe, step, timestep, values: (seen.append(step), values)[1])
    assert seen == list(range(STEPS))


def test_another_number_of_steps_is_an_error_before_the_first_model_call(pipe, expected):
    compiled(pipe)
    with pytest.raises(StepError, match=r"DDIMScheduler was set to 4 timesteps, but the schedule has 6 steps: run"):
        run(DIT, pipe, 4)
    assert smoothcache.report(pipe).calls == 0
    assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5
    with smoothcache.disabled(pipe):
        assert difference(run(DIT, pipe, 4), run(DIT, dit(), 4)) == 0
        assert difference(run(DIT, pipe, STEPS), run(DIT, dit(), STEPS)) == 0
    assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5


def test_a_second_order_solver_says_how_many_timesteps_it_takes(pipe):
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    compiled(pipe)
    with pytest.raises(StepError, match="set to 11 timesteps, but the schedule has 6 steps.*second order"):
        run(DIT, pipe, 6)


def test_a_call_outside_of_a_run_is_computed_in_full(pipe, caplog):
    x, y = embeds(2, 4, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        plain = pipe.transformer(x, torch.tensor([5, 5]), y).sample
        compiled(pipe)
        for _ in range(3):
            assert torch.equal(pipe.transformer(x, torch.tensor([5, 5]), y).sample, plain)
        assert sum("outside of a run of the pipeline's scheduler" in record.message for record in caplog.records) == 1
        run(DIT, pipe, STEPS)
        for _ in range(3):
            assert torch.equal(pipe.transformer(x, torch.tensor([5, 5]), y).sample, plain)
        assert (
            sum("called after the last of the scheduler's 6 steps" in record.message for record in caplog.records) == 1
        )


def test_reset_forgets_what_is_cached(pipe):
    compiled(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    x, y = embeds(2, 4, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps[:2]:
            pipe.transformer(x, timestep.expand(2), y)
            pipe.scheduler.step(x, timestep, x)
        smoothcache.reset(pipe)
        pipe.transformer(x, pipe.scheduler.timesteps[3].expand(2), y)
    assert smoothcache.report(pipe).forced == {"no value in this trajectory yet, at step 2": 1}


# Schedulers are exchanged, shared, copied.


def test_another_scheduler_after_compile(pipe):
    compiled(pipe)
    run(DIT, pipe, STEPS, seed=2)
    old = pipe.scheduler
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    twin = dit()
    twin.scheduler = diffusers.DPMSolverMultistepScheduler()
    with cached_by_hand(DIT, twin, ROWS):
        expected = run(DIT, twin, STEPS)
    for _ in range(2):
        assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5
    assert type(old) is diffusers.DDIMScheduler, "the old one is given back"
    assert not smoothcache.report(pipe).forced


def test_another_scheduler_with_another_number_of_steps(pipe):
    compiled(pipe)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(StepError, match="DPMSolverMultistepScheduler was set to 4 timesteps, but the schedule has 6"):
        run(DIT, pipe, 4)


def test_two_pipelines_share_transformer_and_scheduler():
    pipe = sd3()
    other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    with cached_by_hand(SD3, pipe, ROWS):
        expected = run(SD3, pipe, STEPS)
    image = {"image": embeds(1, 3, 32, 32).clamp(0, 1), "strength": 1.0}
    with cached_by_hand(SD3, other, ROWS):
        expected_other = run(SD3, other, STEPS, **image)
    compiled(pipe)
    for _ in range(2):
        assert difference(run(SD3, pipe, STEPS), expected) <= 1e-5
        assert difference(run(SD3, other, STEPS, **image), expected_other) <= 1e-5
    assert smoothcache.report(other).calls == 4 * STEPS


def test_two_pipelines_share_a_transformer_with_schedulers_of_their_own(caplog):
    pipe, other = sd3(), sd3()
    other.transformer = pipe.transformer
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    plain = run(SD3, other, STEPS)
    with cached_by_hand(SD3, pipe, ROWS):
        expected = run(SD3, pipe, STEPS)
    with cached_by_hand(SD3, other, ROWS):
        expected_other = run(SD3, other, STEPS)
    compiled(pipe)
    run(SD3, pipe, STEPS)
    assert torch.equal(run(SD3, other, STEPS), plain)
    assert "If another pipeline that shares it is running, call smoothcache.compile" in caplog.text
    with pytest.raises(CompiledError, match="compiled already, for another pipeline with another schedule"):
        compiled(other, Schedule(STEPS, {"attn": [1, 0] * 3}))
    compiled(other)
    with pytest.raises(CompiledError, match="compiled already"):
        compiled(other)
    for _ in range(2):
        assert difference(run(SD3, other, STEPS), expected_other) <= 1e-5
        assert difference(run(SD3, pipe, STEPS), expected) <= 1e-5
    smoothcache.remove(other)
    for each in (pipe, other):
        assert type(each.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    compiled(pipe)


def test_an_unknown_pipeline_after_an_interrupted_run_is_computed_in_full():
    pipe, other = sd3(), sd3()
    other.transformer, plain = pipe.transformer, run(SD3, other, STEPS)
    compiled(pipe)
    run(SD3, pipe, STEPS, callback_on_step_end=interrupt)
    assert torch.equal(run(SD3, other, STEPS), plain)


def test_copies_of_a_followed_scheduler_are_plain_and_move_nothing(pipe, expected, tmp_path):
    kind, config = type(pipe.scheduler), dict(pipe.scheduler.config)
    compiled(pipe)
    assert isinstance(pipe.scheduler, kind) and type(pipe.scheduler).__name__ == kind.__name__
    for made in (
        copy.deepcopy(pipe.scheduler),
        copy.copy(pipe.scheduler),
        pickle.loads(pickle.dumps(pipe.scheduler)),
        kind.from_config(pipe.scheduler.config),
    ):
        assert type(made) is kind and dict(made.config) == config
        made.set_timesteps(3)  # another number of steps: nobody minds
    pipe.scheduler.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path)) is kind
    assert difference(run(DIT, pipe, STEPS), expected) <= 1e-5
    smoothcache.remove(pipe)
    assert type(pipe.scheduler) is kind and not vars(pipe.scheduler).keys() & {"step", "set_timesteps"}


# Streams.


LABELS = torch.tensor([3]), torch.tensor([1000])


class Guided:
    """A pipeline of one's own: guidance by two calls in a step, switched off for some steps."""

    def __init__(self, order, guided):
        base = dit()
        self.transformer, self.scheduler, self.text_encoder = base.transformer, base.scheduler, tiny_t5()
        self.order, self.guided = order, guided

    @property
    def components(self):
        return {name: getattr(self, name) for name in ("transformer", "scheduler", "text_encoder")}

    @torch.no_grad()
    def __call__(self, num_inference_steps, generator, return_dict):
        x = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for index, timestep in enumerate(self.scheduler.timesteps):
            outputs = {}
            for which in self.order if index in self.guided else (0,):
                prediction = self.transformer(x, timestep=timestep.expand(1), class_labels=LABELS[which]).sample
                outputs[which] = prediction.chunk(2, dim=1)[0]
            guidance = 3.0 * (outputs[0] - outputs[1]) if 1 in outputs else 0.0
            x = self.scheduler.step(outputs[0] + guidance, timestep, x).prev_sample
        return (x,)


OWN = SimpleNamespace(denoisers=("transformer",), branches=DIT.branches, arguments=dict)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["cond_first", "uncond_first"])
@pytest.mark.parametrize("guided", [{0, 1, 2, 5}, {2, 3, 4}], ids=["off_for_some_steps", "on_later"])
def test_guidance_that_is_switched_on_and_off(guided, order):
    pipe = Guided(order, guided)
    # With these rows nothing is missing where it is reused, if the streams are told apart.
    rows = {"attn": [1, 0, 1, 0, 0, 1], "ffn": [1, 1, 1, 0, 0, 1]}
    stream_of = lambda ordinal, inputs: int(inputs["class_labels"] is LABELS[1])
    with cached_by_hand(OWN, pipe, rows, stream_of=stream_of):
        expected = run(OWN, pipe, STEPS)
    compiled(pipe, Schedule(STEPS, rows))
    for _ in range(2):
        assert difference(run(OWN, pipe, STEPS), expected) <= 1e-5
    assert not smoothcache.report(pipe).forced


def test_the_context_names_the_stream():
    pipe = CASES["wan"].make()
    compiled(pipe, Schedule(STEPS, {"attn": ROWS["attn"]}))
    run(CASES["wan"], pipe, STEPS)
    (program,) = compiled_forward(pipe.transformer).session.programs
    assert {key for binding in program.bindings for key in binding.streams} == {("cond", 0), ("uncond", 0)}
    smoothcache.remove(pipe)
    assert not {"cache_context", "forward"} & vars(pipe.transformer).keys()


# Pipelines that do not use their scheduler as others do.


class OwnSteps(Guided):
    """Calls set_timesteps, but takes the steps itself, as SkyReels' diffusion forcing does."""

    def __init__(self, starts=True):
        super().__init__((), ())
        self.starts = starts
        self.timesteps = torch.linspace(900, 100, STEPS)

    @torch.no_grad()
    def __call__(self, num_inference_steps, generator, return_dict, stop=None):
        x = torch.randn(1, 4, 8, 8, generator=generator)
        if self.starts:
            self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.timesteps[:stop]:
            first = self.transformer(x, timestep=timestep.expand(1), class_labels=LABELS[0]).sample
            second = self.transformer(-x, timestep=timestep.expand(1), class_labels=LABELS[0]).sample
            x = x - 0.1 * (first - 0.5 * second).chunk(2, dim=1)[0]
            self.after_step(timestep)
        return (x,)

    def after_step(self, timestep):
        pass


def test_a_pipeline_that_steps_by_itself_is_followed_by_its_timesteps(caplog):
    pipe = OwnSteps()
    pipe.after_step = lambda timestep: pipe.scheduler.step(torch.zeros(1), int(timestep), torch.zeros(1))
    with cached_by_hand(OWN, pipe, ROWS):
        expected = run(OWN, pipe, STEPS)
    del pipe.after_step
    compiled(pipe)
    run(OWN, pipe, STEPS, seed=2, stop=3)
    for _ in range(2):
        assert difference(run(OWN, pipe, STEPS), expected) <= 1e-5
    assert sum("does not call scheduler.step" in record.message for record in caplog.records) == 1
    report = smoothcache.report(pipe)
    assert not report.forced and report.steps == 15


def test_a_loop_that_leaves_the_scheduler_alone_is_computed_in_full(caplog):
    pipe = OwnSteps(starts=False)
    plain = run(OWN, pipe, STEPS)
    compiled(pipe)
    assert torch.equal(run(OWN, pipe, STEPS), plain)
    assert "outside of a run of the pipeline's scheduler" in caplog.text
