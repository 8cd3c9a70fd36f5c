"""Which calls go straight to their launch, and which the dispatcher still sees."""

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qdiff.ops import _shortcut, backend
from qdiff.ops.registry import operator

looked, launched = [], []  # at the arguments; without
declines = [False]


def launch(tensors):
    if declines[0]:
        return None
    launched.append([tensor.data_ptr() for tensor in tensors])
    return total(*tensors)


def total(*tensors):
    with torch.no_grad():
        return sum(tensor.float() for tensor in tensors)


def _fake(x: Tensor, y: Tensor | None, sizes: Sequence[int], levels: int = 7, copy: bool = False) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@operator(_fake)
def shortcut_probe(x: Tensor, y: Tensor | None, sizes: Sequence[int], levels: int = 7, copy: bool = False) -> Tensor:
    """x + y. Args: of no meaning."""
    looked.append(x.data_ptr())
    result = total(*(tensor for tensor in (x, y) if tensor is not None))
    _shortcut.offer((y, x.clone() if copy else x), launch)  # in an order of its own
    return result


@operator(_fake)
def shortcut_outer(x: Tensor, y: Tensor | None, sizes: Sequence[int], levels: int = 7, copy: bool = False) -> Tensor:
    """x + y + y. Args: of no meaning."""
    return shortcut_probe(x, y, sizes) + y


@pytest.fixture(autouse=True)
def nothing_known():
    _shortcut.forget()
    looked.clear()
    launched.clear()
    yield
    declines[0] = False
    _shortcut.forget()


def pair(*shape):
    return torch.randn(shape or (2, 3)), torch.randn(shape or (2, 3))


def went(*args, **kwargs):
    """The way that a call went, whose result is checked."""
    before = len(looked), len(launched)
    result = shortcut_probe(*args, **kwargs)
    assert torch.equal(result, total(*(value for value in args if isinstance(value, Tensor))))
    after = len(looked), len(launched)
    return {(1, 0): "the long way", (0, 1): "straight"}[after[0] - before[0], after[1] - before[1]]


def test_a_call_like_an_earlier_one_is_launched_for_its_own_tensors():
    assert went(*pair(), [1, 2]) == "the long way"
    x, y = pair()
    assert went(x, y, [1, 2]) == "straight"
    assert launched == [[y.data_ptr(), x.data_ptr()]]


@pytest.mark.parametrize(
    "other",
    [
        lambda: (*pair(3, 2), [1, 2]),
        lambda: (torch.randn(3, 2).t(), torch.randn(2, 3), [1, 2]),
        lambda: (torch.randn(2, 3), torch.randn(2, 3).half(), [1, 2]),
        lambda: (torch.randn(2, 3), None, [1, 2]),
        lambda: (*pair(), [1, 3]),
        lambda: (*pair(), (1, 2)),
        lambda: (*pair(), [1, 2], 6),
        lambda: (torch.nn.Parameter(torch.randn(2, 3)), torch.randn(2, 3), [1, 2]),
        lambda: (torch.randn(2, 3), torch.randn(2, 3).requires_grad_(), [1, 2]),
    ],
    ids=["shape", "strides", "dtype", "None", "list", "tuple", "number", "class", "gradient"],
)
def test_any_other_call_is_looked_at(other):
    assert went(*pair(), [1, 2]) == "the long way"
    assert went(*other()) == "the long way"
    assert went(*pair(), [1, 2]) == "straight"


def test_kinds_are_known_side_by_side():
    kinds = [(*pair(), [1, 2]), (*pair(), [1, 3]), (torch.randn(2, 3), None, [1, 2]), (*pair(4, 4), [1, 2], 5)]
    assert {went(*kind) for kind in kinds} == {"the long way"}
    assert {went(*kind) for kind in kinds} == {"straight"}


def test_a_list_that_changed_is_another():
    sizes = [1, 2]
    went(*pair(), sizes)
    sizes[0] = 3
    assert went(*pair(), sizes) == "the long way"


def test_what_a_launch_declines_is_looked_at():
    went(*pair(), [1, 2])
    declines[0] = True
    assert went(*pair(), [1, 2]) == "the long way"


def test_a_launch_of_copies_is_not_kept():
    for _ in range(2):
        assert went(*pair(), [1, 2], 7, True) == "the long way"


def test_one_tensor_for_two_arguments_goes_the_long_way():
    x = torch.randn(2, 3)
    for _ in range(3):
        assert went(x, x, [1, 2]) == "the long way"
    assert went(*pair(), [1, 2]) == "the long way"
    assert went(*pair(), [1, 2]) == "straight"


def test_what_an_operator_within_offers_is_not_its_callers():
    x, y = pair()
    for _ in range(2):
        assert torch.equal(shortcut_outer(x, y, [1, 2]), x + y + y)
    assert (len(looked), len(launched)) == (1, 1)


def test_keywords_go_the_long_way():
    x, y = pair()
    went(x, y, [1, 2])
    shortcut_probe(x, y=y, sizes=[1, 2])
    assert len(looked) == 2


def test_another_backend_forgets():
    went(*pair(), [1, 2])
    with backend.use_backend("reference"):
        assert went(*pair(), [1, 2]) == "the long way"
    assert went(*pair(), [1, 2]) == "the long way"


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


def test_a_mode_sees_every_call():
    for _ in range(2):
        with Names() as mode:
            shortcut_probe(*pair(), [1, 2])
        assert "qdiff.shortcut_probe.default" in mode.seen


def test_the_profiler_sees_every_call():
    for _ in range(2):
        with torch.autograd.profiler.profile() as profile:
            shortcut_probe(*pair(), [1, 2])
        assert "qdiff::shortcut_probe" in {event.name for event in profile.function_events}
        went(*pair(), [1, 2])


def test_fake_tensors_get_the_fake():
    went(*pair(), [1, 2])
    with FakeTensorMode():
        assert type(shortcut_probe(*pair(), [1, 2])) is not Tensor


def test_a_compiled_function_holds_the_operator():
    went(*pair(), [1, 2])
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, y = pair()
    compiled = torch.compile(lambda a, b: shortcut_probe(a, b, [1, 2]), fullgraph=True, backend=keep)
    assert torch.equal(compiled(x, y), x + y)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.qdiff.shortcut_probe.default]


@pytest.mark.parametrize("warm", [False, True])
def test_a_trainable_input_goes_to_autograd(warm):
    x, y = pair()
    x.requires_grad_()
    with torch.no_grad():
        if warm:
            assert [went(x, y, [1, 2]) for _ in range(2)] == ["the long way"] * 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"qdiff\.shortcut_probe.* has no gradient"):
            shortcut_probe(x, y, [1, 2]).sum().backward()


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_state_of_torchs_has_kinds_of_its_own(state):
    went(*pair(), [1, 2])
    with state():
        went(*pair(), [1, 2])
        assert went(*pair(), [1, 2]) == "straight"
    assert went(*pair(), [1, 2]) == "straight"


def test_nothing_that_is_kept_keeps_a_tensor_alive():
    x, y = pair()
    references = weakref.ref(x), weakref.ref(y), weakref.ref(shortcut_probe(x, y, [1, 2]))
    torch.ops.qdiff.shortcut_probe.default(x, y, [1, 2])  # nobody takes its offer
    del x, y
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_threads():
    def work(n):
        x, y = pair(n % 3 + 1, 2)
        return torch.equal(shortcut_probe(x, y, [1, 2]), x + y)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(_shortcut, "_MOST_KEYS", 3)
    monkeypatch.setattr(_shortcut, "_MOST_KINDS", 4)
    for n in range(9):
        went(*pair(n + 1, 2), [1, 2])
        went(*pair(), [1, n])
    assert len(_shortcut._known) <= 3
    assert max(map(len, _shortcut._known.values())) <= 4
