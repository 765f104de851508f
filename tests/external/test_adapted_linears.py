"""Linear layers that are not ``nn.Linear`` any more: LoRA beside them, weights quantised, an op that hides them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from external.packages import load
from helpers.cases import Case
from helpers.checks import check_all_compute, check_sites, check_trajectory
from helpers.models import CASES

Adapt = Callable[[nn.Module], nn.Module]
#: Fused and separate projections, cross-attention, two streams, and one from diffusers.
MODELS = ["adaln_zero", "joint", "diffusers_pixart"]
each_model = pytest.mark.parametrize("name", MODELS)


@dataclass(frozen=True)
class AdaptedCase(Case):
    """A case whose model is changed once its parameters have their values."""

    adapt: Adapt = nn.Module.eval

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.adapt(super().build(seed, dtype))


def adapted(name: str, adapt: Adapt) -> Case:
    case = CASES[name]
    fields = {field: getattr(case, field) for field in Case.__dataclass_fields__}
    return AdaptedCase(**{**fields, "adapt": adapt})


def check(case: Case, dtype: torch.dtype = torch.float32, plain_backend: str | None = None) -> None:
    check_sites(case, case.build(0, dtype), dtype)
    check_trajectory(case, dtype)
    check_all_compute(case, dtype, plain_backend)


def linears(model: nn.Module) -> list[str]:
    """Names of the blocks' linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name]


@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
@each_model
def test_lora(name, merged):
    peft = load("peft")

    def make() -> nn.Module:
        model = CASES[name].make()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears(model))
        return peft.inject_adapter_in_model(config, model)

    def merge(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if merged and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
        return model

    case = adapted(name, merge)
    check(replace(case, make=make))


def quantized(config: object) -> Adapt:
    quantization = load("torchao.quantization")

    def quantize(model: nn.Module) -> nn.Module:
        wanted = set(linears(model))
        quantization.quantize_(model, config, filter_fn=lambda module, name: name in wanted)
        assert all(type(model.get_submodule(name).weight) is not nn.Parameter for name in wanted)
        return model

    return quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@each_model
def test_quantized_weights(name, config, dtype):
    check(adapted(name, quantized(getattr(load("torchao.quantization"), config)())), dtype)


@torch.library.custom_op("smoothcache_tests::hidden_linear", mutates_args=())
def hidden_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An op that PyTorch cannot see into, as quantised kernels are."""
    return F.linear(x, weight, bias).clone()


@hidden_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class HiddenLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return hidden_linear(x, self.weight, self.bias)


def hide(model: nn.Module) -> nn.Module:
    for name in linears(model):
        model.set_submodule(name, HiddenLinear(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_model
def test_an_opaque_op_in_place_of_linear(name, dtype):
    # With two threads the joint model's last bit already differs under torch.compile(backend="aot_eager") alone.
    check(adapted(name, hide), dtype, plain_backend="aot_eager")
