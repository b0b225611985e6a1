"""What a program costs, before it runs: memory, floating-point operations, and communication between devices."""

import collections
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend import core


def flops(function: Callable, *args) -> int:
    """Floating-point operations of the convolutions and matrix products of a function, a multiply-add counted as two.

    Read from its jaxpr, so of all devices together, and for each use of a loop's body. All else (activations,
    normalisation, augmentation, the optimizer) is left out, as is usual: a hundredth of the work, bound by memory.

    Args:
      function: traced, never compiled nor run.
      *args: what it takes, or their shapes and types.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return _jaxpr_flops(jitted.trace(*args).jaxpr.jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        lhs = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    if name == "cond":  # as much as its most expensive branch
        return max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(_jaxpr_flops(inner) for inner in core.jaxprs_in_params(params))


def _convolution_flops(equation) -> int:
    """Each tap of the kernel meets each input pixel, and each output pixel each tap, once at most.

    So zeros that only dilate or surround the input are not counted: the gradient of an unpadded convolution costs what
    the convolution does. Where a kernel extends beyond the border of a padded image it is counted whole, as is usual.
    """
    lhs, rhs = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    layout = equation.params["dimension_numbers"]
    batch, channels = out[layout.out_spec[0]], out[layout.out_spec[1]]
    positions = math.prod(
        rhs[k] * min(lhs[i], out[o])
        for i, k, o in zip(layout.lhs_spec[2:], layout.rhs_spec[2:], layout.out_spec[2:], strict=True)
    )
    return 2 * batch * channels * rhs[layout.rhs_spec[1]] * positions


def peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on each device: arguments, temporary arrays, and results that do not take the place of an argument.

    None where the compiler does not report it. What libraries allocate for themselves while they run is not counted.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def held_bytes(tree) -> int:
    """Bytes on each device of arrays, or of shapes with shardings."""
    arrays = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


class Collective(NamedTuple):
    """One operation by which devices send each other data."""

    kind: str  # as XLA names it, one of `KINDS`
    size: int  # bytes reduced, gathered or exchanged in one group; of a permutation, those that a device sends
    participants: int  # devices in a group; of a permutation, those that send
    executions: int  # how often it runs, where a loop repeats it
    name: str  # of the operation in the source, if the compiler knows it

    @property
    def factor(self) -> float:
        """How much of the buffer each device sends, if the devices of a group form a ring."""
        n = self.participants
        if self.kind == "collective-permute":
            return 1.0
        return (2 if self.kind == "all-reduce" else 1) * (n - 1) / n

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all executions."""
        return self.factor * self.size * self.executions


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """What the devices of a compiled program send each other in one run; empty for one device.

    A loop counts as often as the compiler knows it to run, or once.
    """
    return read_collectives(compiled.as_text())


def read_collectives(text: str) -> list[Collective]:
    """The same as `collectives`, from the text of an optimized HLO module."""
    bodies, entry = _computations(text)
    runs = _executions(bodies, entry)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    return [
        _collective(line, found, runs[name], devices)
        for name, lines in bodies.items()
        for line in lines
        if runs[name] and (found := _COLLECTIVE.search(line))
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a module, and the name of its entry computation."""
    bodies, entry, current = {}, "", None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = begins[2]
            bodies[current] = []
            entry = current if begins[1] else entry
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _executions(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often each computation runs. Computations stand before those that call them, so callers come first here."""
    runs = collections.Counter({entry: 1})
    for name in reversed(bodies):
        for line in bodies[name]:
            trips = _TRIPS.search(line) if " while(" in line else None
            branches = _BRANCHES.search(line)
            for called in _CALLED.findall(line) + re.findall(r"[\w.\-]+", branches[1] if branches else ""):
                runs[called] += runs[name] * (int(trips[1]) if trips else 1)
    return runs


def _collective(line: str, found: re.Match, executions: int, devices: int) -> Collective:
    shape, kind, starts = found.groups()
    sizes = [_bytes(*array) for array in _ARRAY.findall(shape)]
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", line)[1]
        participants = len(set(re.findall(r"\{(\d+),", pairs)))
    else:
        participants = _participants(line, devices)
    if not starts or kind == "all-reduce":
        size = sum(sizes)
    elif kind == "collective-permute":
        size = sizes[1]  # operand, result, and maybe two counters
    else:
        size = sum(sizes[len(sizes) // 2 :])  # operands, then results
    if kind == "reduce-scatter":
        size *= participants  # each keeps its part of the result
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, participants, executions, name[1] if name else "")


def _participants(line: str, devices: int) -> int:
    """Devices in a group, from one of three notations: `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['a'=4,'b'=2] {'b'}`."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])  # maybe a part of an axis
        return math.prod(int(part or lengths[axis]) for axis, part in axes)
    return devices


def _bytes(kind: str, shape: str) -> int:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return -(-bits * math.prod(int(n) for n in shape.split(",") if n) // 8)
