"""Each call of a captured graph: from the binding's decisions to the variant that carries them out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .binding import Binding, Forced
from .caches import CacheKeeper
from .calls import CurrentCall
from .variant import Mask, Variant, VariantBuilder

log = logging.getLogger(__name__)


class Dispatcher(Protocol):
    """Runs a captured graph. The call that the thread is in has its binding; inputs come as one list, to be cleared."""

    _boxed_call: bool
    #: What was built so far, by the decision that each is for.
    variants: dict[Hashable, Variant]

    def __call__(self, inputs: list[Any]) -> Sequence[Any]: ...

    def serve(self, builder: Any, variants: dict[Hashable, Variant]) -> None: ...

    def close(self) -> None: ...


class GuardedDispatcher:
    """The dispatcher of a captured graph with guards: decides, and runs the variant for the decision."""

    _boxed_call = True  # tells AOTAutograd that the inputs come as one list

    def __init__(
        self, builder: VariantBuilder, current: CurrentCall, keeper: CacheKeeper, compiling: AbstractContextManager[Any]
    ) -> None:
        self.builder = builder
        self._keeper = keeper
        self.current = current
        self.variants: dict[Hashable, Variant] = {}
        #: Held where a variant is compiled: only one thread may compile at a time.
        self._compiling = compiling
        #: Held where a binding is read and changed.
        self._lock = threading.Lock()
        self._holds: dict[tuple[Any, ...], bool] = {}

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        call = self.current.call
        binding, moment = call.binding, call.moment
        signature = tuple([inputs[i] for i in self.builder.shape_inputs])
        with self._lock:
            stream = binding.stream(moment.stream, tuple([inputs[i] for i in self.builder.size_inputs]), moment.lane)
            if stream.called != moment.trajectory:
                stream.called = moment.trajectory
                self._keeper.begins(moment.trajectory, moment.lane)
            mask = binding.decide(stream, moment.trajectory, moment.step)
        variant = self._variant(binding, mask, signature, inputs)
        buffers = stream.arguments.get((variant, stream.heads))
        if buffers is None:
            buffers = binding.arguments(stream, variant, mask, self.builder, inputs)
        arguments = [*variant.pick_inputs(inputs), *buffers]
        if variant.takes_coefficients:
            arguments.append(binding.coefficients(stream, moment.step, self.builder))
        inputs.clear()
        try:
            outputs = variant.run(arguments)
        except BaseException:
            stream.trajectory = -1  # some buffers may be half written
            raise
        with self._lock:
            binding.commit(stream, mask, moment.step)
            binding.calls[mask, variant.flops] += 1
        if log.isEnabledFor(logging.DEBUG):
            computed = mask.compute.bit_count()
            log.debug("step %d, stream %s: computed %d of %d", moment.step, moment.stream, computed, len(binding.sites))
        return outputs

    def serve(self, builder: VariantBuilder, variants: dict[Hashable, Variant]) -> None:
        """Run another builder's variants: those that were built so far, and more as they are needed."""
        self.builder, self.variants = builder, variants
        self._holds.clear()

    def close(self) -> None:
        """Forget the variants."""
        self.variants.clear()
        self._holds.clear()

    def _variant(self, binding: Binding, mask: Mask, signature: tuple[Any, ...], inputs: Sequence[Any]) -> Variant:
        if not signature:
            key: Hashable = mask
        elif not self.builder.shape_generic:
            key = mask, signature
        else:
            if signature not in self._holds:
                self._holds[signature] = self.builder.holds_for(inputs)
            key = mask if self._holds[signature] else (mask, None)
        variant = self.variants.get(key)
        if variant is None:
            with self._compiling:
                variant = self.variants.get(key)  # another thread may have been here
                if variant is None:
                    variant = self.variants[key] = self._build(binding, key, mask, inputs)
        return variant

    def _build(self, binding: Binding, key: Hashable, mask: Mask, inputs: Sequence[Any]) -> Variant:
        if key == (mask, None):
            log.warning("a variant does not hold for inputs of these sizes: it runs uncompiled, and slower")
            binding.forced[Forced.OTHER_SIZES, -1] += 1
            return self.builder.build_uncompiled(mask)
        start = time.perf_counter()
        variant = self.builder.build(mask, inputs)
        variant.seconds = time.perf_counter() - start
        self._holds.clear()  # compiling may have assumed more of the sizes
        return variant
