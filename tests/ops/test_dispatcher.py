"""Every operation through the dispatcher, at 0, 1 and 2 rows or queries, against `reference`: the real launchers, on a
pretended GPU or a CUDA device.

The dispatcher refuses outputs that share storage, with each other or with an input. A direct call of a launcher does
not show that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from contract import assert_contract
from detr_fast import reference
from detr_fast.kernels import common

for _name in common.NAMES:
    import_module(f"detr_fast.kernels.{_name}")

CPU = torch.device("cpu")


class Case(NamedTuple):
    """The arguments of an operation, and its definition, which takes the same."""

    arguments: tuple[Any, ...]
    definition: Callable[..., tuple[Tensor, ...]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bias_relu(rows: int) -> Case:
    x, residual = (random(rows, 3, 2, 5, seed=i).contiguous(memory_format=torch.channels_last) for i in (0, 1))
    return Case((x, random(3), residual, True), lambda *arguments: (reference.bias_relu(*arguments),))


def add_layer_norm(rows: int) -> Case:
    arguments = random(rows, 24), random(rows, 24, seed=1), random(24, seed=2), random(24, seed=3), 1e-5
    return Case(arguments, lambda *arguments: (reference.add_layer_norm(*arguments),))


def attention(queries: int) -> Case:
    """So many keys that sm_90 splits them."""
    k, v = random(2, 70, 32, seed=1), random(2, 70, 32, seed=2)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[0, 50:] = padding[1] = True
    return Case((random(2, queries, 32), k, v, 2, padding), lambda *arguments: (reference.attention(*arguments),))


def attention_map(queries: int) -> Case:
    padding = torch.tensor([[False, False, True], [True, True, True]])
    image = torch.arange(queries)
    arguments = random(queries, 32), random(2, 3, 32, seed=1), image, 2, padding
    return Case(arguments, lambda *arguments: (reference.attention_map(*arguments),))


def group_norm_relu_upsample(queries: int) -> Case:
    x, shared, image = random(queries, 4, 3, 2), random(2, 4, 5, 4, seed=1), torch.arange(queries)

    def definition(*arguments: Any) -> tuple[Tensor]:
        return (reference.group_norm_relu_upsample(*arguments[:-2], arguments[-2:]),)

    return Case((x, random(4, seed=2), random(4, seed=3), 2, 1e-5, shared, image, 5, 4), definition)


def mask_upsample(queries: int) -> Case:
    def definition(masks: Tensor, counts: list[int], *sizes: Any) -> tuple[Tensor]:
        padded, processed, target, threshold = sizes
        return (reference.mask_upsample(masks, padded, processed[:2], target[:2], threshold).flatten(),)

    sizes = [12, 16], [12, 13, 5, 5], [9, 7, 3, 3], 0.5
    return Case((random(queries, 3, 4), [queries, 0], *sizes), definition)


def merged(parts: list[reference.Merged]) -> tuple[Tensor, ...]:
    ids, *others = (torch.cat([part.flatten() for part in column]) for column in zip(*parts, strict=True))
    segment, area, box = others
    return ids.to(torch.uint8), segment, area, box.view(-1, 4)


ISTHING = torch.tensor([True, True, False])


def panoptic_merge(queries: int, ours: bool = True) -> Case:
    """An image with all queries, and one without any."""
    large, small = [12, 16], [5, 5]
    processed, target = [12, 13, 5, 5], [9, 7, 3, 3]
    resized = [*large, *large] if ours else processed

    def definition(masks: Tensor, labels: Tensor, isthing: Tensor, *_: Any) -> tuple[Tensor, ...]:
        first = reference.panoptic_merge(masks, labels, isthing, resized[:2], processed[:2], target[:2], ours)
        second = reference.panoptic_merge(masks[:0], labels[:0], isthing, resized[2:], small, target[2:], ours)
        return merged([first, second])

    arguments = random(queries, 3, 4), torch.arange(queries), ISTHING, [queries, 0], resized, processed, target, ours
    return Case(arguments, definition)


def weighted_merge(queries: int) -> Case:
    def definition(
        masks: Tensor, scores: Tensor, labels: Tensor, fuse: Tensor, counts: list[int], *sizes: Any
    ) -> tuple[Tensor, ...]:
        target, *thresholds = sizes
        first = reference.weighted_merge(masks, scores, labels, fuse, target[:2], *thresholds)
        second = reference.weighted_merge(masks[:0], scores[:0], labels[:0], fuse, target[2:], *thresholds)
        return merged([first, second])

    scores, labels = torch.linspace(0.9, 0.99, queries), torch.arange(queries)
    return Case((random(queries, 3, 4), scores, labels, ~ISTHING, [queries, 0], [9, 7, 3, 3], 0.5, 0.1), definition)


CASES: dict[str, Callable[[int], Case]] = {
    "add_layer_norm": add_layer_norm,
    "attention": attention,
    "attention_map": attention_map,
    "bias_relu": bias_relu,
    "group_norm_relu_upsample": group_norm_relu_upsample,
    "mask_upsample": mask_upsample,
    "panoptic_merge": panoptic_merge,
    "panoptic_merge, facebookresearch's": lambda queries: panoptic_merge(queries, ours=False),
    "weighted_merge": weighted_merge,
}
TRAINED = ("add_layer_norm", "attention", "attention_map", "group_norm_relu_upsample")


@pytest.fixture(params=["sm_70", "sm_90"])
def gpu(request: pytest.FixtureRequest, device: torch.device) -> Iterator[torch.device]:
    """Where operations run their launchers."""
    with nullcontext() if device.type == "cuda" else common.pretended(request.param):
        yield device


def placed(arguments: tuple[Any, ...], device: torch.device) -> list[Any]:
    return [x.to(device) if isinstance(x, Tensor) else x for x in arguments]


def in_float64(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def outcome(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.cpu() for x in ((returned,) if isinstance(returned, Tensor) else returned))


def assert_apart(tensors: list[Tensor]) -> None:
    """No two share storage."""
    storages = [x.untyped_storage()._cdata for x in tensors]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_computes_the_definition(name: str, rows: int, gpu: torch.device) -> None:
    operation = getattr(torch.ops.detr_fast, name.partition(",")[0])
    arguments, definition = CASES[name](rows)
    given = placed(arguments, gpu)
    returned = operation(*given)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    assert_apart([*outputs, *(x for x in given if isinstance(x, Tensor))])
    plain = definition(*arguments)
    if name in ("panoptic_merge", "panoptic_merge, facebookresearch's", "weighted_merge"):
        kept = plain[1] >= 0  # areas and boxes of other queries are not defined
        for found, expected in zip(outcome(returned)[:2], plain[:2], strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
        for found, expected in zip(outcome(returned)[2:], plain[2:], strict=True):
            assert torch.equal(found[kept], expected[kept])
        return
    exact = definition(*in_float64(arguments))
    for computed in zip(outcome(returned), plain, exact, strict=False):  # attention's log-sum-exp has no definition
        assert computed[0].shape == computed[1].shape and computed[0].dtype == computed[1].dtype
        if computed[0].numel():
            assert_contract(*computed)


def gradients(function: Callable[..., Any], arguments: list[Any]) -> tuple[Tensor, ...]:
    """Of all floating point arguments, for a gradient of the first outcome that is not the same everywhere."""
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    returned = function(*leaves)
    out = returned if isinstance(returned, Tensor) else returned[0]
    grad = random(*out.shape, seed=9).to(out)
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not out.requires_grad:  # the definition's of nothing
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_differentiates_the_definition(name: str, rows: int, gpu: torch.device) -> None:
    arguments, definition = CASES[name](rows)
    found = gradients(getattr(torch.ops.detr_fast, name), placed(arguments, gpu))
    plain = gradients(definition, list(arguments))
    exact = gradients(definition, in_float64(arguments))
    for computed in zip(outcome(found), plain, exact, strict=True):
        assert computed[0].shape == computed[1].shape and computed[0].dtype == computed[1].dtype
        if computed[0].numel():
            assert_contract(*computed)


def test_every_operation_is_here() -> None:
    registered = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    names = {name for namespace, name in registered if namespace == "detr_fast"}
    backward = {"add_layer_norm_backward", "attention_backward"}  # which the gradients run
    assert names == {name.partition(",")[0] for name in CASES} | backward


def test_a_launcher_runs_where_a_gpu_is_pretended_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers refuse float64, CPU bodies compute in it."""
    arguments = in_float64(bias_relu(1).arguments)
    operation = torch.ops.detr_fast.bias_relu
    expected = operation(*arguments)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with common.pretended("sm_90"), pytest.raises(TypeError, match="x must be of one of"):
        operation(*arguments)
    assert torch.equal(operation(*arguments), expected)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with common.pretended("sm_90"):
        assert torch.equal(operation(*arguments), expected)


def test_devices() -> None:
    with common.pretended("sm_70"):
        assert common.is_pretended() and common.device_of(CPU) == common.Device(70, False, 80)
        with common.pretended("gfx942"):
            assert common.device_of(torch.device("cuda", 3)) == common.Device("gfx942", True, 304)
        assert common.device_of(CPU).target == 70
    assert not common.is_pretended()
    message = r"target must be one of sm_70, .*, gfx942, got 'sm_71'"
    with pytest.raises(ValueError, match=message), common.pretended("sm_71"):
        pass


def test_a_configuration_is_that_of_the_nearest_lower_capability() -> None:
    table: dict[int | str, str] = {70: "volta", 80: "ampere", "gfx942": "cdna"}
    targets = {60: "volta", 70: "volta", 75: "volta", 80: "ampere", 121: "ampere", "gfx942": "cdna", "gfx90a": "cdna"}
    assert {target: common.config_for(table, target) for target in targets} == targets
    assert common.config_for({70: "volta"}, "gfx942") == "volta"
