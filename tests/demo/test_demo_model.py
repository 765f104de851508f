"""The demo's model: its structure, what it was trained to, its sampler, and the metrics that judge it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.tolerances import COARSE, assert_close
from smoothcache_fx.demo import extras
from smoothcache_fx.demo.judge import load_judge
from smoothcache_fx.demo.model import DiT, randomize
from smoothcache_fx.demo.sampler import initial_noise, sample
from smoothcache_fx.demo.weights import WEIGHTS, load_model, save_model

SMALL = {"image_size": 8, "patch_size": 2, "width": 32, "depth": 3, "heads": 2}


def small(**changes: int) -> DiT:
    return randomize(DiT(**{**SMALL, **changes}), seed=1)


def inputs(model: DiT, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model.channels, model.image_size, model.image_size)
    return (
        torch.randn(shape, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randint(model.num_classes, (batch,), generator=generator),
    )


@pytest.fixture(scope="module")
def trained() -> DiT:
    return load_model()


@pytest.mark.parametrize(
    "changes", [{}, {"channels": 3}, {"patch_size": 1}, {"image_size": 12, "patch_size": 4, "num_classes": 3}]
)
def test_the_velocity_has_the_shape_of_the_image(changes):
    model = small(**changes)
    x, t, y = inputs(model)
    assert model(x, t, y).shape == x.shape
    assert model.unpatchify(model.patchify(x)).equal(x)


def test_bfloat16_stays_bfloat16_with_float32_timesteps():
    model = small().bfloat16()
    x, t, y = inputs(model)
    velocity = model(x.bfloat16(), t, y)
    assert velocity.dtype == torch.bfloat16
    assert_close(velocity.float(), small()(x, t, y), COARSE)


def test_a_new_model_predicts_zero_and_a_randomized_one_uses_every_parameter():
    x, t, y = inputs(small())
    assert DiT(**SMALL)(x, t, y).count_nonzero() == 0
    model = small()
    model(x, t, torch.tensor([0, 4, model.num_classes])).square().sum().backward()
    unused = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not unused


def test_randomize_depends_on_the_seed_alone():
    first, again, other = (randomize(DiT(**SMALL), seed) for seed in (0, 0, 1))
    x, t, y = inputs(first)
    assert first(x, t, y).equal(again(x, t, y))
    assert not first(x, t, y).allclose(other(x, t, y))


def test_timestep_and_label_condition_every_image_by_itself():
    model = small()
    x, t, y = inputs(model)
    before = model(x, t, y)
    second = torch.tensor([0, 1, 0])
    for changed in (model(x, t + 0.1 * second, y), model(x, t, (y + second) % 10)):
        torch.testing.assert_close(changed[[0, 2]], before[[0, 2]])
        assert not changed[1].allclose(before[1], atol=1e-3)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 1.5, 4.0])
def test_forward_with_cfg_is_guidance_by_hand_in_one_call(cfg_scale):
    model = small()
    x, t, y = inputs(model)
    conditional, null = model(x, t, y), model(x, t, torch.full_like(y, model.num_classes))
    calls = []
    forward = model.forward
    model.forward = lambda *args: calls.append(args) or forward(*args)
    guided = model.forward_with_cfg(x, t, y, cfg_scale)
    torch.testing.assert_close(guided, null + cfg_scale * (conditional - null))
    assert [len(args[0]) for args in calls] == [2 * len(x)]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_compiles_as_one_graph(patch_size):
    model = small(patch_size=patch_size)
    x, t, y = inputs(model)
    with torch.no_grad():
        for method, arguments in ((model.forward, ()), (model.forward_with_cfg, (1.5,))):
            compiled = torch.compile(method, fullgraph=True, backend="eager")
            assert compiled(x, t, y, *arguments).equal(method(x, t, y, *arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "multiple of patch_size 3, got 8"),
        ({"heads": 5}, "multiple of 4 and of heads 5, got 32"),
        ({"width": 30, "heads": 3}, "multiple of 4 .* got 30"),
        ({"depth": 0}, "depth must be above 0, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**SMALL, **changes})


def test_wrong_inputs_are_refused():
    model = small()
    x, t, y = inputs(model)
    with pytest.raises(ValueError, match=r"x must be \[batch, 1, 8, 8\], got \[3, 1, 16, 16\]"):
        model(torch.randn(3, 1, 16, 16), t, y)
    with pytest.raises(ValueError, match=r"here \[3\], got \[1\] and \[3\]"):
        model(x, t[:1], y)
    with pytest.raises(ValueError, match="floating point.*got torch.int64"):
        model(x, (1000 * t).long(), y)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3, 10, -1], r"from 0 to 9.*got \[-1, 10\]"),
        ([0.5], r"integers \[n\].*got torch.float32 \[1\]"),
        ([[1, 2]], r"got torch.int64 \[1, 2\]"),
        ([], r"got torch.float32 \[0\]"),
    ],
)
def test_wrong_labels_are_refused_before_the_model_runs(labels, message):
    model = small()
    model.forward = None
    with pytest.raises(ValueError, match=message):
        sample(model, labels)


@pytest.mark.parametrize(("arguments", "message"), [({"steps": 0}, "steps.*got 0"), ({"seed": -1}, "seed.*got -1")])
def test_steps_and_seed_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(small(), [1], **arguments)


def test_sampling_takes_euler_steps_with_one_call_each():
    model = small()
    labels, steps, seen, calls = torch.tensor([7, 0]), 4, [], []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(args))
    images = sample(model, labels, steps=steps, cfg_scale=2.0, seed=5, step_callback=lambda *step: seen.append(step))
    handle.remove()
    assert len(calls) == steps
    x = initial_noise(2, (1, 8, 8), seed=5)
    with torch.no_grad():
        for step in range(steps):
            t = torch.full((2,), 1 - step / steps)
            x = x - model.forward_with_cfg(x, t, labels, 2.0) / steps
            assert seen[step][0] == step
            torch.testing.assert_close(seen[step][1], x)
    torch.testing.assert_close(images, x)
    assert images.dtype == torch.float32 and not images.requires_grad


def test_samples_depend_on_the_seed_and_their_index_alone():
    model, labels = small(), torch.arange(6)
    images = sample(model, labels, steps=2, seed=3)
    assert images.equal(sample(model, labels, steps=2, seed=3))
    torch.testing.assert_close(sample(model, labels[:2], steps=2, seed=3), images[:2])
    assert not images.allclose(sample(model, labels, steps=2, seed=4))
    noise = initial_noise(500, (1, 8, 8), seed=0)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(noise.flatten(1).unique(dim=0)) == 500


def test_a_module_wrapped_by_torch_compile_samples_alike():
    model = small()
    torch.testing.assert_close(
        sample(torch.compile(model, backend="eager", fullgraph=True), [1, 2], steps=3),
        sample(model, [1, 2], steps=3),
    )


def gated_shares(model: DiT) -> dict[str, list[float]]:
    """Of each branch, call by call: the norm of gate * branch, over that of the block's output."""
    shares: dict[str, list[float]] = {}

    def watch(name: str, block: nn.Module) -> None:
        seen: dict[str, Tensor] = {}

        def measure(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            chunks = block.adaLN_modulation(args[1]).chunk(6, dim=1)
            for kind, gate in (("attn", chunks[2]), ("mlp", chunks[5])):
                share = (gate.unsqueeze(1) * seen[kind]).norm() / output.norm()
                shares.setdefault(f"{name}.{kind}", []).append(float(share))

        for kind in ("attn", "mlp"):
            branch = getattr(block, kind)
            branch.register_forward_hook(lambda *call, kind=kind: seen.__setitem__(kind, call[2]))
        block.register_forward_hook(measure)

    for index, block in enumerate(model.blocks):
        watch(f"blocks.{index}", block)
    return shares


def test_weights_are_small_and_every_branch_carries_weight():
    assert WEIGHTS.stat().st_size < 8_000_000
    model = load_model()
    assert not model.training and len(model.blocks) >= 12
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    shares = gated_shares(model)
    sample(model, [3, 8], steps=5)
    assert len(shares) == 2 * len(model.blocks)
    assert min(max(share) for share in shares.values()) > 0.002, "no gate is shut, as an untrained one is"
    weak = {name for name, share in shares.items() if max(share) < 0.02}
    assert weak <= {"blocks.0.attn"}, "of the first block's attention training has made little use"


def test_samples_are_recognised_and_near_the_real_images(trained):
    judge, labels = load_judge(), torch.arange(100) % 10
    images = sample(trained, labels, steps=15)
    assert judge.accuracy(images, labels) >= 0.9
    assert judge.accuracy(images, (labels + 1) % 10) <= 0.05
    assert judge.frechet_distance(images) < 2 * judge.real_frechet_distance(100)


def test_weights_come_back_as_they_were_saved(tmp_path):
    model = small()
    save_model(model, tmp_path / "small.safetensors")
    loaded = load_model(path=tmp_path / "small.safetensors")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor.half().float())


def test_missing_or_foreign_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*demo.train"):
        load_model(path=tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    config = json.dumps(small().config)
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"config": config})
    for name in ("text", "bare", "other"):
        with pytest.raises(ValueError, match=f"{name}.safetensors' holds no DiT of this version"):
            load_model(path=tmp_path / f"{name}.safetensors")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'safetensors.*pip install "smoothcache_fx\[demo\]"'):
        load_model()
    with pytest.raises(ImportError, match="needs no_such_module"):
        extras.require("no_such_module")
