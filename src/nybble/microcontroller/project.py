"""A stack as a folder of C: the step, its weights, tensors to compare with, and a Makefile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nybble.core.errors import DataError
from nybble.core.files import atomic_copy, atomic_write_json, atomic_write_text
from nybble.core.seeds import generator
from nybble.core.versions import VERSION
from nybble.microcontroller.emulator import Emulator
from nybble.microcontroller.layer import Layer
from nybble.microcontroller.memory import Array, Memory, memory
from nybble.microcontroller.settings import Settings
from nybble.microcontroller.stack import Plan, Stack, multiply_adds, plan

FIXED = ("Makefile", "main.c", "kernels.h", "number.h")
TYPE_NUMBERS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}
_HERE = Path(__file__).parent / "c"
_PER_LINE = 16


def write_project(stack: Stack, folder: Path, settings: Settings) -> Memory:
    """Write a training step as C.

    Args:
        stack: the network, with its weights.
        folder: empty.
        settings: type, lanes, what learns, and how.

    Returns:
        what the step needs of memory.

    Raises:
        UsageError: more memory than the limit, a layer to train that there is not. DataError: weights that are not
            finite in the type. FileError: the folder can't be written.
    """
    needs = memory(stack, settings.dtype, settings.trained)
    if settings.memory:
        needs.refuse_above(settings.memory)
    planned = plan(stack, settings.trained)
    _check_weights(stack, settings.dtype)
    for name in FIXED:
        atomic_copy(_HERE / name, folder / name)
    texts = {
        "config.mk": _config(settings),
        "config.h": _header(stack, settings),
        "net.h": _NET_H,
        "net.c": _net(stack, planned, needs, settings),
        "weights.h": _weights(stack, settings),
        "reference.h": _reference(stack, settings),
    }
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    atomic_write_json(folder / "memory.json", _report(stack, planned, needs))
    return needs


def tensors_of(needs: Memory) -> list[Array]:
    """Arrays that ``main.c`` dumps, in their order: weights, gradients, activations."""
    return [a for a in needs.arrays if a.element == "elem" and a.name not in ("columns", "turned", "scratch")]


def reference_sample(stack: Stack, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sample that reference tensors are of: normal noise, and a class (or such values) drawn with a fixed seed."""
    drawn = generator(0, "c-train reference")
    x = torch.randn(stack.shapes[0], generator=drawn).to(dtype)
    target = torch.zeros(stack.outputs)
    target[int(torch.randint(stack.outputs, (), generator=drawn))] = 1
    return x, target


def _check_weights(stack: Stack, dtype: torch.dtype) -> None:
    for name, held in stack.weights.items():
        for role, value in held.items():
            if not torch.isfinite(value.to(dtype)).all():
                raise DataError(f"{name}: its {role} has values that {str(dtype).removeprefix('torch.')} can't hold.")


def _config(settings: Settings) -> str:
    lines = (f"# nybble {VERSION}", f"TYPE = {TYPE_NUMBERS[settings.dtype]}", "LANES ?= 1")
    more = (f"FUSED ?= {int(settings.fused)}", f"UNROLL ?= {settings.unroll}", f"CORES ?= {settings.cores}")
    return "\n".join((*lines, *more)) + "\n"


def _header(stack: Stack, settings: Settings) -> str:
    return f"""/* {prod(stack.shapes[0])} numbers come in, {stack.outputs} go out; made by nybble {VERSION}. */
#ifndef CONFIG_H
#define CONFIG_H
#if TYPE != {TYPE_NUMBERS[settings.dtype]}
#error "these weights are of TYPE {TYPE_NUMBERS[settings.dtype]}; export again for another type"
#endif
#define NET_INPUTS {prod(stack.shapes[0])}
#define NET_OUTPUTS {stack.outputs}
#endif
"""


_NET_H = """/* A training step. Not reentrant: tensors are static arrays, as many bytes as memory.json says. */
#ifndef NET_H
#define NET_H
#include "config.h"
#include "number.h"
typedef struct { const char *name; elem *data; int count; } net_tensor;
extern const net_tensor net_tensors[];
extern const int net_tensor_count;
extern const long net_mac; /* multiply-adds of a step, those of matrix products */
void net_init(void); /* initial weights */
const elem *net_forward(const elem *x); /* NET_INPUTS numbers, CHW -> NET_OUTPUTS */
float net_step(const elem *x, const float *target, float rate, float decay); /* the loss before the update */
elem *net_data(const char *name); /* a tensor, 0 where there is none */
#endif
"""


def _net(stack: Stack, planned: Plan, needs: Memory, settings: Settings) -> str:
    shown = tensors_of(needs)
    total = sum(map(sum, multiply_adds(stack, planned).values()))
    lines = [
        f"/* Made by nybble {VERSION}: {len(stack.layers)} layers, {needs.bytes:,} bytes of arrays. */",
        '#include "net.h"',
        '#include "kernels.h"',
        '#include "weights.h"',
        "",
        *(f"static {a.element} {a.name}[{a.count}]; /* {a.use} */" for a in needs.arrays),
        *(line for layer in stack.layers for line in layer.c_declarations()),
        "",
        "const net_tensor net_tensors[] = {",
        *(f'  {{"{a.name}", {a.name}, {a.count}}},' for a in shown),
        "};",
        f"const int net_tensor_count = {len(shown)};",
        f"const long net_mac = {total}L;",
        "elem *net_data(const char *name) {",
        "  for (int i = 0; i < net_tensor_count; i++)",
        "    if (!strcmp(net_tensors[i].name, name)) return net_tensors[i].data;",
        "  return 0;",
        "}",
        *_function("void net_init(void)", _initial(stack)),
        *_function("const elem *net_forward(const elem *x)", _forward(stack)),
        *_function("static void backward(void)", _backward(planned)),
        *_function("static void update(elem rate, elem decay)", _updates(stack, planned)),
        *_function(
            "float net_step(const elem *x, const float *target, float rate, float decay)", _step(stack, settings)
        ),
    ]
    return "\n".join(lines) + "\n"


def _function(head: str, body: Iterable[str]) -> list[str]:
    return ["", f"{head} {{", *(f"  {line}" for line in body), "}"]


def _initial(stack: Stack) -> list[str]:
    names = [layer.parameter(role) for layer in stack.learned for role in layer.parameters]
    return [f"memcpy({name}, init_{name}, sizeof {name});" for name in names]


def _forward(stack: Stack) -> list[str]:
    calls = [f"{layer.c_forward()} /* {layer.name} */" for layer in stack.layers]
    return ["copy(x, t0, NET_INPUTS);", *calls, f"return t{stack.output};"]


def _backward(planned: Plan) -> list[str]:
    lines: list[str] = []
    made: set[int] = set()
    for layer in planned.backward:
        if layer.name in planned.updated:
            lines.append(f"{layer.c_learn()} /* {layer.name} */")
        for which, number in enumerate(layer.inputs):
            if number in planned.carried:
                lines.append(_carried(layer, which, number in made))
                made.add(number)
    return lines


def _carried(layer: Layer, which: int, there: bool) -> str:
    """The gradient of an input; added to what is there already from another layer that reads it."""
    into = f"g{layer.inputs[which]}"
    if not there:
        return f"{layer.c_back(which, into)} /* {layer.name} */"
    count = prod(layer.shapes[which])
    return f"{layer.c_back(which, 'scratch')} accumulate({into}, scratch, {count}); /* {layer.name} */"


def _updates(stack: Stack, planned: Plan) -> list[str]:
    return [
        f"sgd({layer.parameter(role)}, {layer.parameter(role, True)}, {prod(shape)}, rate, decay);"
        for layer in stack.learned
        if layer.name in planned.updated
        for role, shape in layer.parameters.items()
    ]


def _step(stack: Stack, settings: Settings) -> list[str]:
    return [
        "net_forward(x);",
        f"float loss = loss_{settings.loss}(t{stack.output}, target, g{stack.output}, powers, NET_OUTPUTS);",
        "backward();",
        "update(narrow(rate), narrow(decay));",
        "return loss;",
    ]


def _weights(stack: Stack, settings: Settings) -> str:
    arrays = [
        _array(f"static const elem_bits init_{layer.parameter(role)}", stack.weights[layer.name][role], settings.dtype)
        for layer in stack.learned
        for role in layer.parameters
    ]
    return "/* Initial weights, as bits. */\n" + "\n".join(arrays) + "\n"


def _array(head: str, values: Tensor, dtype: torch.dtype) -> str:
    bits = bits_of(values.to(dtype))
    digits = dtype.itemsize * 2
    rows = [
        "  " + ", ".join(f"0x{bit:0{digits}x}" for bit in bits[at : at + _PER_LINE]) + ","
        for at in range(0, len(bits), _PER_LINE)
    ]
    return f"{head}[{len(bits)}] = {{\n" + "\n".join(rows) + "\n};"


def bits_of(values: Tensor) -> Sequence[int]:
    """A tensor's numbers as unsigned integers."""
    whole = values.contiguous().flatten()
    kind, mask = (torch.int32, 0xFFFFFFFF) if whole.dtype == torch.float32 else (torch.int16, 0xFFFF)
    return [bit & mask for bit in whole.view(kind).tolist()]


def _reference(stack: Stack, settings: Settings) -> str:
    """One step of the emulation, with the scalar kernels and with the vector ones."""
    x, target = reference_sample(stack, settings.dtype)
    number, lanes = TYPE_NUMBERS[settings.dtype], sorted({1, settings.lanes})
    parts, rows = [], []
    for width in lanes:
        made, row = _one_reference(stack, settings, width, x, target)
        parts.append(made)
        rows.append(f"  {{{number}, {width}, {int(settings.fused)}, {row}}},")
    rate, decay = (float(torch.tensor(v, dtype=torch.float32)).hex() for v in (settings.rate, settings.decay))
    return (
        "\n".join(
            (
                f"/* One step as nybble {VERSION} emulates it, with LANES {' and '.join(map(str, lanes))}. */",
                f"#define REFERENCE_RATE {rate}f",
                f"#define REFERENCE_DECAY {decay}f",
                "typedef struct { const char *name; const elem_bits *bits; } reference_tensor;",
                "typedef struct { int type, lanes, fused; uint32_t loss; const reference_tensor *tensors; int count; } "
                "reference;",
                _array("static const elem_bits reference_input", x, settings.dtype),
                f"static const float reference_target[] = {{{', '.join(f'{float(v)}f' for v in target)}}};",
                *parts,
                "static const reference references[] = {",
                *rows,
                "};",
                f"static const int reference_count = {len(lanes)};",
            )
        )
        + "\n"
    )


def _one_reference(stack: Stack, settings: Settings, lanes: int, x: Tensor, target: Tensor) -> tuple[str, str]:
    emulator = Emulator(stack, settings.arithmetic(lanes), update=settings.trained, loss=settings.loss)
    step = emulator.step(x, target, settings.rate, settings.decay)
    held: dict[str, Tensor] = {f"t{stack.output}": step.output}
    for layer in stack.learned:
        for role in step.gradients.get(layer.name, {}):
            held[layer.parameter(role, True)] = step.gradients[layer.name][role]
            held[layer.parameter(role)] = emulator.weights[layer.name][role]
    names = {name: f"reference_{lanes}_{name}" for name in held}
    arrays = [_array(f"static const elem_bits {names[name]}", value, settings.dtype) for name, value in held.items()]
    table = ", ".join(f'{{"{name}", {names[name]}}}' for name in held)
    (loss,) = bits_of(torch.tensor([step.loss], dtype=torch.float32))
    arrays.append(f"static const reference_tensor reference_{lanes}[] = {{{table}}};")
    return "\n".join(arrays), f"0x{loss:08x}, reference_{lanes}, {len(held)}"


def _report(stack: Stack, planned: Plan, needs: Memory) -> dict[str, object]:
    """memory.json."""
    products = multiply_adds(stack, planned)
    layers = {
        name: {"elements": [*row], "multiply_adds": [*products[name]], "learns": name in planned.updated}
        for name, row in needs.layers.items()
    }
    arrays = [{"name": a.name, "count": a.count, "element": a.element, "use": a.use} for a in needs.arrays]
    return {"bytes": needs.bytes, "bytes_of_a_number": needs.bytes_each, "layers": layers, "arrays": arrays}
