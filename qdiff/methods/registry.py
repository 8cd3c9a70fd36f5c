"""Names of methods: a file in this folder that registers a dataclass is a new method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from qdiff.methods.contract import ActivationRange, Method, Rounding, Transform
from qdiff.recipe import LayerPlan, MethodSpec, nearest_names

M = TypeVar("M", bound=Method)
R = TypeVar("R", bound=Method)
REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: the method `name` of a recipe is this dataclass. Raises `ValueError` for a name taken."""

    def add(cls: type[M]) -> type[M]:
        if name in REGISTRY:
            raise ValueError(f"method name {name!r} is taken by {REGISTRY[name].__qualname__}; choose another")
        REGISTRY[name] = cls
        return cls

    return add


def resolve(spec: MethodSpec, role: type[R] = Method) -> R:  # type: ignore[type-abstract, assignment]
    """The method that a spec names, with its options.

    Raises `ValueError` for a name that is not registered (with the nearest names), one of another role, an option that
    the method does not have, and whatever the method says of an option's value.
    """
    fitting = [name for name, cls in REGISTRY.items() if issubclass(cls, role)]
    if spec.name not in REGISTRY:
        raise ValueError(f"unknown method {spec.name!r}: {nearest_names(spec.name, fitting)}")
    cls = REGISTRY[spec.name]
    if not issubclass(cls, role):
        raise ValueError(f"method {spec.name!r} is no {role.__name__}: use one of {', '.join(sorted(fitting))}")
    options = [field.name for field in dataclasses.fields(cls)]
    for option in spec.options:
        if option not in options:
            known = nearest_names(option, options) if options else "it has none"
            raise ValueError(f"unknown option {option!r} of method {spec.name!r}: {known}")
    try:
        return cls(**spec.options)
    except TypeError as error:  # a comparison of, say, a string with a number
        raise ValueError(
            f"method {spec.name!r} got an option of the wrong type: {dict(spec.options)}; {error}"
        ) from error


# For a step of the input pipeline that is taken: the steps that cannot be taken any more, and why.
_TOO_LATE: dict[str, tuple[tuple[str, ...], str]] = {
    "index": (("shift",), "a shift is of the raw input"),
    "smooth": (("shift",), "scales are measured about zero, which a shift moves"),
    "rotation": (("shift", "index", "smooth"), "a rotation mixes the channels that it would treat one by one"),
    "low_rank": (("shift", "index", "smooth", "rotation"), "the branch reads the input as it is by then"),
    "weight": (
        ("first_token", "shift", "index", "smooth", "rotation", "low_rank"),
        "only the weight that is rounded can be clipped",
    ),
}


def check_order(plan: LayerPlan, transforms: Sequence[Transform]) -> None:
    """Raise `ValueError` for two transforms of a plan that do not go together, in this order or at all."""
    named = [(spec.name, transform.step) for spec, transform in zip(plan.transforms, transforms)]
    for place, (later, step) in enumerate(named):
        for earlier, taken in named[:place]:
            steps, reason = _TOO_LATE.get(taken, ((), ""))
            if step and step == taken:
                raise ValueError(
                    f"{plan.name}: transforms {earlier!r} and {later!r} do not go together: both change the layer's "
                    f"{step}; use one of them"
                )
            if step in steps:
                raise ValueError(
                    f"{plan.name}: transform {later!r} cannot come after {earlier!r}: {reason}; put {later!r} before it"
                )


def range_mode(spec: MethodSpec) -> str:
    """The mode of the activation range that a spec names: what `LayerPlan.range_mode` is to be."""
    return resolve(spec, ActivationRange).mode  # type: ignore[type-abstract]


def methods_of(plan: LayerPlan) -> tuple[list[Transform], Rounding, ActivationRange | None]:
    """The methods of a plan, each in its role; the range is None where activations stay at 16 bits.

    Raises `ValueError` for a method that does not suit the plan.
    """
    transforms = [resolve(spec, Transform) for spec in plan.transforms]  # type: ignore[type-abstract]
    check_order(plan, transforms)
    rounding = resolve(plan.rounding, Rounding)  # type: ignore[type-abstract]
    range_ = None if plan.range_mode == "none" else resolve(plan.range, ActivationRange)  # type: ignore[type-abstract]
    for method in (*transforms, rounding, *([range_] if range_ else [])):
        method.check(plan)
    return transforms, rounding, range_


def needs_of(plan: LayerPlan) -> frozenset[str]:
    """What calibration must collect for the layer of a plan."""
    transforms, rounding, range_ = methods_of(plan)
    methods: list[Method] = [*transforms, rounding, *([range_] if range_ else [])]
    needs: frozenset[str] = frozenset().union(*(method.needs for method in methods))
    # What was measured of each channel says nothing of a range once channels are shifted, split or mixed: samples do.
    measured = range_ is not None and range_.mode != "dynamic"
    remade = any(transform.step in ("shift", "index", "rotation") for transform in transforms)
    return needs | {"samples"} if measured and remade else needs
