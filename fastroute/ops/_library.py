"""Registration of the operators: one schema each, whether or not the extension is built.

Every module of this package names its schemas in `SCHEMAS`; setup.py reads the same strings into the extension, so that
a process without Python has them too. The Triton kernels are a second set of operators with the same schemas, fake kernels
and gradients, in a namespace of their own (fastroute/triton/_library.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastroute import buffers
from fastroute.backends import EXTENSION, BackendError, requested, select
from fastroute.ops import _checks as check
from fastroute.ops._schemas import digest, read_schemas

NAMESPACE = "fastroute"
TRITON_NAMESPACE = "fastroute_triton"

# Arguments that may lie on the CPU wherever the others are: numbers that the host reads or writes.
ON_HOST = frozenset({"cost", "spent"})

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_SCHEMAS = read_schemas(Path(__file__).parent)
EXTENSION.load(digest(_SCHEMAS))
if EXTENSION.reasons:
    for _schema in _SCHEMAS:
        LIBRARY.define(_schema)


class Operator(NamedTuple):
    """What an operator has beside its kernels."""

    reference: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None
    setup_context: Callable[..., Any] | None
    once: bool


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    once: bool = False,
) -> None:
    """Give operator `name` its reference for every device without a kernel, its fake kernel and its gradient.

    The gradient is `backward(ops, ctx, *grads)`; it calls operators of the namespace `ops`, the one of its operator, so that
    a gradient runs on the backend that ran the forward pass. `once`: it is a gradient without a gradient of its own.
    """
    OPERATORS[name] = Operator(reference, fake, backward, setup_context, once)
    LIBRARY.impl(name, as_kernel(name, reference), "CompositeExplicitAutograd")
    register_rules(LIBRARY, NAMESPACE, name)


def by_reference(reference: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`backward` and `setup_context` of an operator that is differentiated by running `reference` again."""

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [...]
        leaves, ctx.structure = tree_flatten(inputs)
        ctx.leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.places = [n for n, x in enumerate(leaves) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(leaves[n] for n in ctx.places))

    def backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [...]
        leaves = list(ctx.leaves)
        for n, x in zip(ctx.places, ctx.saved_tensors, strict=True):
            leaves[n] = x
        wanted = [n for n in ctx.places if leaves[n].requires_grad]
        # Only for a second derivative is the first one itself to be differentiated.
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            found = reference(*tree_unflatten(leaves, ctx.structure))
        grads = torch.autograd.grad(found, [leaves[n] for n in wanted], grad, create_graph=twice, allow_unused=True)
        known = dict(zip(wanted, grads, strict=True))
        return tuple(tree_unflatten([known.get(n) for n in range(len(leaves))], ctx.structure))

    return backward, setup_context


def in_own_dtype(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference`, computing in the dtypes that it names under torch.autocast too, as the kernels do."""

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        kind = next(_tensors((*args, *kwargs.values()))).device.type
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return reference(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return reference(*args, **kwargs)

    return run


def as_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` as the kernel of operator `name`, which may be called past the checks of Python: its errors name it."""
    op, own = public_name(name), in_own_dtype(reference)

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        for x in _tensors((*args, *kwargs.values())):
            check.tensor(op, "every tensor", x)
        try:
            return own(*args, **kwargs)
        except Exception as error:
            if buffers.is_exhausted(error):
                raise exhausted(op, error, next(_tensors((*args, *kwargs.values()))).device) from error
            if op in str(error):
                raise
            kind = type(error) if type(error) in (RuntimeError, TypeError, NotImplementedError) else ValueError
            raise kind(f"{op}: {error}") from error

    return run


def register_rules(library: torch.library.Library, namespace: str, name: str) -> None:
    """Fake kernel, gradient and rule of vmap of operator `name` in `namespace`."""
    operator, overload = OPERATORS[name], _overload(namespace, name)
    torch.library.register_fake(f"{namespace}::{name}", _on_one_device(overload, operator.fake), lib=library)
    if operator.backward is not None:
        # What torch.library.register_autograd would register, behind a check: it drops the tangents of forward mode.
        backward = partial(operator.backward, getattr(torch.ops, namespace))
        kernel = make_autograd_impl(overload, Info(backward, operator.setup_context))
        library.impl(name, partial(_without_tangents, public_name(name), kernel), "Autograd", with_keyset=True)
    if operator.once:
        kernel = partial(_differentiated_once, overload)
        library.impl(name, partial(_without_tangents, public_name(name), kernel), "Autograd", with_keyset=True)
    if overload._schema.is_mutable:
        library.impl(name, partial(_written_under_vmap, overload), "FuncTorchBatched")
    else:
        torch.library.register_vmap(f"{namespace}::{name}", partial(_one_by_one, overload), lib=library)


class _Once(torch.autograd.Function):
    """Gradients that have none themselves: an error in the backward pass, where nothing would come back."""

    @staticmethod
    def forward(ctx: Any, op: str, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # [...] each
        ctx.op = op
        return tuple(x.view_as(x) for x in tensors[:number])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # [...] each
        raise NotImplementedError(
            f"{ctx.op}: there is no second derivative of the kernels; under fastroute.use_backend('reference') there is"
        )


def _differentiated_once(overload: torch._ops.OpOverload, keyset: Any, *args: Any) -> list[Tensor]:
    with torch.no_grad():
        found: list[Tensor] = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    wanted = [x for x in _tensors(args) if x.requires_grad] if torch.is_grad_enabled() else []
    return list(_Once.apply(_name_of(overload), len(found), *found, *wanted)) if wanted else found


def public_name(name: str) -> str:
    """The operator whose overload or gradient `name` is."""
    return name.partition(".")[0].removeprefix("_").removesuffix("_backward")


def _overload(namespace: str, name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _on_one_device(overload: torch._ops.OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, but an error for tensors of several devices: one on "meta" would bring those on the CPU here too."""
    op = _name_of(overload)
    names = [argument.name for argument in overload._schema.arguments]

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [(key, x) for key, value in given.items() for x in _tensors((value,))]
        first = tensors[0][1].device
        check.one_device(op, (t for t in tensors if not (t[0] in ON_HOST and t[1].device.type == "cpu" != first.type)))
        return fake(*args, **kwargs)

    return checked


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors among `values`, some of which are lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _name_of(overload: torch._ops.OpOverload) -> str:
    return public_name(overload._schema.name.partition("::")[2])


def _without_tangents(op: str, kernel: Callable[..., Any], keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """The gradient of an operator called by its name; the public function knows what to do in forward mode."""
    if forward_ad._current_level >= 0 and _has_tangents(args):
        raise NotImplementedError(
            f"{op}: the operator has no formula for forward-mode differentiation (torch.func.jvp, jacfwd); call "
            f"fastroute.{op}, which then runs in plain PyTorch, or use reverse mode"
        )
    return kernel(keyset, *args, **kwargs)


def _has_tangents(values: Any) -> bool:
    return any(forward_ad.unpack_dual(x).tangent is not None for x in _tensors(values) if x.is_floating_point())


def _one_by_one(overload: torch._ops.OpOverload, info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The rule of vmap: the operators take batches themselves, so this is for those who need the transform."""
    if info.batch_size == 0:
        raise ValueError(f"{_name_of(overload)}: torch.vmap over nothing has no result")

    def pick(value: Any, dim: Any, at: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [pick(v, d, at) for v, d in zip(value, dim, strict=True)] if isinstance(dim, (list, tuple)) else value
        return value if dim is None else value.select(dim, at)

    results = [overload(*pick(list(args), list(in_dims), at), **kwargs) for at in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    kind = type(results[0])
    return kind(torch.stack(parts) for parts in zip(*results, strict=True)), kind([0] * len(results[0]))


def _written_under_vmap(overload: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    if any(map(torch._C._functorch.is_batchedtensor, _tensors((args, list(kwargs.values()))))):
        raise NotImplementedError(
            f"{_name_of(overload)}: torch.vmap cannot write into `out`; leave it away, or give all images in one call"
        )
    with retrieve_current_functorch_interpreter().lower():
        return overload(*args, **kwargs)


def is_transformed(values: Any) -> bool:
    """Whether torch.func transforms one of `values`, or forward mode differentiates by it."""
    if torch._C._functorch.maybe_current_level() is not None and any(
        map(torch._C._functorch.is_functorch_wrapped_tensor, _tensors(values))
    ):
        return True
    return forward_ad._current_level >= 0 and _has_tangents(values)


def in_plain_torch(op: str, reference: Callable[..., Any], *args: Any, **out: Any) -> Any:
    """The reference under torch.func: every transform knows plain PyTorch."""
    if (request := requested()) not in (None, "reference"):
        raise BackendError(
            f"{op}: backend '{request}' was asked for but cannot run: torch.func and forward-mode differentiation transform "
            "plain PyTorch alone (backend reference)"
        )
    if out:
        raise NotImplementedError(f"{op}: torch.func and forward-mode differentiation cannot write into `out`; leave it away")
    try:
        return reference(*args)
    except RuntimeError as error:
        if op in str(error):
            raise
        raise NotImplementedError(f"{op}: torch.func cannot transform this call: {error}") from error


def write_result(op: str, out: Tensor, y: Tensor, inputs: Iterable[Tensor]) -> None:  # [...], [...], [...] each
    """Write `y`, which the reference made of `inputs`, into `out`, with the errors of a kernel that writes there itself."""
    check.written(op, "out", out, inputs)
    check.dtype(op, "out", out.dtype, (y.dtype,))
    if y.shape != out.shape:
        raise ValueError(f"{op}: out must be {tuple(y.shape)}; got {tuple(out.shape)}")
    with torch.no_grad():
        out.copy_(y)


def call(name: str, reference: Callable[..., Any], device: torch.device, *args: Any, **out: Any) -> Any:
    """Run operator `name` on the chosen backend.

    An overload is named in full, `op.overload`: torch tries one after another, and prints all arguments for each that does
    not fit. Without a name it is `op.out` where `out` is given.
    """
    compiling = torch.compiler.is_compiling()
    packet, _, overload = name.partition(".")
    backend = select(packet, device)
    transformed = not compiling and is_transformed((args, list(out.values())))
    # Classes and places have no derivative, and the operators know vmap.
    if transformed and (out or backend == "reference" or OPERATORS[packet].backward is not None):
        return in_plain_torch(packet, reference, *args, **out)
    # A compiled graph holds the operator, whose kernel may well be the reference, unless the reference was asked for.
    if backend == "reference" and (requested() or not compiling):
        run: Callable[..., Any] = in_own_dtype(reference)
    else:
        namespace = torch.ops.fastroute_triton if backend == "triton" else torch.ops.fastroute
        run = getattr(getattr(namespace, packet), overload or ("out" if out else "default"))
    if compiling:
        return run(*args, **out)
    if out and backend == "triton":
        for key, written in out.items():
            check.written(packet, key, written, _tensors((args, [x for k, x in out.items() if k != key])))
    try:
        if (
            backend == "reference"
            or out
            or transformed
            or torch.is_inference_mode_enabled()
            or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        ):
            found = run(*args, **out)
            # Torch counts what its own operators write, for whoever has saved it for a gradient.
            for written in out.values():
                if not written.is_inference():
                    torch.autograd.graph.increment_version(written)
            return found
        # What torch would do itself, but only after it has entered Python, which takes as long as the rest of a small call.
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        # A kernel is not told why a copy failed; of a dense tensor it fails for want of memory alone.
        if not (buffers.is_exhausted(error) or '"aten::contiguous"' in str(error)):
            raise
        raise exhausted(packet, error, device) from None


def exhausted(op: str, error: BaseException, device: torch.device) -> BaseException:
    """Memory that ran out, as the error that a caller expects, with what to do."""
    message = str(error).strip().split("\n")[0]
    if not message.startswith(f"{op}: out of memory"):
        reason = message[at:] if (at := message.find("DefaultCPUAllocator")) >= 0 else message
        if '"aten::contiguous"' in message:
            reason = "cannot allocate a contiguous copy of an argument"
        message = (
            f"{op}: out of memory: {reason or 'the system gave none'}; work on fewer or smaller images at a time, for example "
            "some rows, or free memory"
        )
    return torch.OutOfMemoryError(message) if device.type == "cuda" else MemoryError(message)
