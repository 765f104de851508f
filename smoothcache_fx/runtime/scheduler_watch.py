"""Following a scheduler: callbacks for its ``set_timesteps`` and ``step``."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Hashable
from typing import Any, Protocol, cast

from torch.utils.weak import WeakIdKeyDictionary

#: What ``object.__reduce_ex__`` makes objects with; type stubs lack it.
_NEW_OBJECT = getattr(copyreg, "__newobj__")  # noqa: B009


class Follower(Protocol):
    """What is called back after each call of the scheduler."""

    def began(self, scheduler: Any) -> None: ...

    def stepped(self, scheduler: Any) -> None: ...


# Which clocks follow a scheduler. Not an attribute of the scheduler: a copy of it is not followed.
_followers = WeakIdKeyDictionary()


def watch(scheduler: Any, clock: Follower) -> None:
    """Tell ``clock`` of each ``set_timesteps`` and ``step`` of this scheduler from now on.

    The instance gets a subclass of its class: pipelines deep-copy their scheduler (LTX2 has one for audio), and a
    function put on the instance would go with the copy and move the clock twice a step. Copies, pickles and saved
    configs are of the scheduler's own class.
    """
    if not _followers.get(scheduler):
        scheduler.__class__ = _watched_class(cast(Hashable, type(scheduler)))
    _followers.setdefault(scheduler, []).append(clock)


def unwatch(scheduler: Any, clock: Follower) -> None:
    """Undo ``watch``; the last clock to leave gives the scheduler its class back."""
    followers = _followers.get(scheduler, [])
    if clock in followers:
        followers.remove(clock)
        if not followers:
            del _followers[scheduler]
            scheduler.__class__ = type(scheduler).__mro__[1]


@functools.cache
def _watched_class(base: Any) -> type:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        for clock in _followers.get(self, ()):
            clock.began(self)
        return result

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, *args, **kwargs)
        for clock in _followers.get(self, ()):
            clock.stepped(self)
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = base.__reduce_ex__(self, protocol)
        if function is _NEW_OBJECT:
            function = base.__new__  # pickle checks that the other one gets the object's own class
        return function, tuple(base if argument is watched else argument for argument in arguments), *rest

    members = {"set_timesteps": set_timesteps, "step": step, "__reduce_ex__": __reduce_ex__}
    members.update(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    watched = type(base.__name__, (base,), members)
    return watched
