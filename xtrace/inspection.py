"""A saved guest joined with replay and analyze: is a vCPU caught inside a hypercall, how far did it get, what would break.

Stands on `xtrace.pipeline` (findings, outcomes and exit status are those of an analysis) and on `xtrace.image`. Each vCPU
on a hypercall instruction becomes a ``sample`` event; only one that is *parked* is judged as a continuation.

Parked, and what shows it:

* ``proved`` true: the registers hold progress (continuation bits, a flagged count), or the memory behind them does (an index
  in the structure, a multicall entry marked as preempted) and nothing shows that the call was not made.
* ``inferred`` true: 64-bit PV only, the SYSCALL was executed (rcx, r11) and rip was set back; or a multicall that stands
  behind entries with results.
* false: rip is elsewhere, or just past the instruction; 64-bit PV, the SYSCALL has not been executed (rcx); or the
  hypercall is one that no release ever leaves (``inferred``).
* null, ``unobservable``: on the instruction, and nothing tells a call not yet made from one preempted before its first unit.

With ``tasks`` the guest's memory is searched for parked tasks as well (`xtrace.image.tasks`): a saved frame on a hypercall
instruction is read like a vCPU. It counts as parked only where the frame is shown to be in use, and the evidence is the weaker
one of the two. Frames of which that cannot be told are listed, judged by nobody, and ask for a review.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from xtrace import config, release
from xtrace.analyze import judging
from xtrace.analyze.exposure import EXIT_REVIEW
from xtrace.errors import InputError, UnknownRelease
from xtrace.image.behind import MULTICALL, finished_entries, memory_behind
from xtrace.image.insn import call_of, executed, stand
from xtrace.image.opening import open_image
from xtrace.image.tasks import Tasks, find_tasks
from xtrace.ingest.base import Ledger, Observed
from xtrace.ingest.source import Source
from xtrace.pipeline import Options, Result, analyze_recording
from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.links import PAGING_DOMCTL_CONT
from xtrace.replay.states import States
from xtrace.schema import ARGS, EVENTS, EVIDENCE, SCHEMA_VERSION

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from xtrace.image.base import Image, Vcpu
    from xtrace.image.frames import Frame, Scan
    from xtrace.image.insn import Call, Stand
    from xtrace.image.memory import Memory
    from xtrace.image.tasks import Life

__all__ = ("SCHEMA_VERSION", "Inspection", "TaskState", "VcpuState", "inspect")

#: Hypercall numbers end here in every release.
_NUMBERS: Final = 64

#: Multicall entries whose inside is read no deeper than this.
_NESTED: Final = 1


@dataclass(slots=True)
class VcpuState:
    """What one vCPU is at.

    Attributes:
        vcpu: as the image holds it.
        stand: where its instruction pointer is.
        parked: it is inside a hypercall that was preempted (None: cannot be told).
        evidence: of ``parked`` (DESIGN §2). why: one sentence.
        call: what the registers ask, if it stands on a hypercall instruction.
        memory: fields behind that call.
        reading: the source's decoding (``schema.READING``), if it stands on one.
    """

    vcpu: Vcpu
    stand: Stand
    parked: bool | None = False
    evidence: str = "proved"
    why: str = ""
    call: Call | None = None
    memory: dict[str, int] = field(default_factory=dict)
    reading: dict[str, Any] | None = None

    @property
    def on_hypercall(self) -> bool | None:
        """Whether it stands on a hypercall instruction; None if its code is not in the image."""
        return None if self.stand.where == "unreadable" else self.stand.where == "on"


@dataclass(frozen=True, slots=True)
class TaskState:
    """A saved frame on a hypercall instruction: perhaps a task that is parked inside the call.

    Attributes:
        frame: where it stands. life: whether it is in use.
        state: what its registers say, as those of a vCPU that stands there.
    """

    frame: Frame
    life: Life
    state: VcpuState

    @property
    def parked(self) -> bool | None:
        """Whether a task is inside a hypercall that was preempted (None: cannot be told)."""
        return self.state.parked if self.life.live else self.life.live

    @property
    def evidence(self) -> str:
        """Of ``parked``: the weaker one of what shows that the frame is in use and what shows that its call is in progress."""
        return max(self.life.evidence, self.state.evidence, key=EVIDENCE.index) if self.life.live else self.life.evidence

    @property
    def why(self) -> str:
        """One sentence."""
        return f"{self.life.why}; {self.state.why}" if self.life.live else self.life.why

    @property
    def undecided(self) -> bool:
        """Whether it would be parked if the frame were in use, which cannot be told."""
        return self.life.live is None and self.state.parked is True


@dataclass(slots=True)
class Inspection:
    """An image, its vCPUs and the analysis of what they hold.

    Attributes:
        tasks: saved frames on a hypercall instruction; None if they were not looked for.
        scan: what the search of the memory counted.
    """

    path: str
    image: Image
    vcpus: list[VcpuState]
    result: Result
    tasks: list[TaskState] | None = None
    scan: Scan | None = None

    @property
    def undecided(self) -> int:
        """Saved frames that may be parked tasks."""
        more = self.scan.on - len(self.scan.frames) if self.scan is not None else 0
        return more + sum(task.undecided for task in self.tasks or ())

    @property
    def bits(self) -> int:
        """Return the exit status (DESIGN §5)."""
        return self.result.bits | (EXIT_REVIEW if self.undecided else 0)


def inspect(path: str | os.PathLike[str], options: Options | None = None, *, tasks: bool = False) -> Inspection:
    """Inspect a saved guest.

    Args:
        path: an ``xl save`` file, a libxl or libxc stream, a core of ``xl dump-core``; compressed or not; ``-`` is stdin.
        options: source, targets (others are not used).
        tasks: search the guest's memory for parked tasks.

    Raises:
        InputError: it is no image, or no vCPU could be read.
        UsageError: an option names something that does not exist.
    """
    options = options or Options()
    if options.source:
        release.parse(options.source)
    with Source(path) as source:
        image = open_image(source)
        recording = _Vcpus(image, source.path, find_tasks(image) if tasks else None)
        result = analyze_recording(
            source.path, recording, options, role=_role(source.path), aim=recording.aim, weigh=recording.weigh
        )
        if recording.note:
            result.notes.append(recording.note)
    result.failed += [InputError(source.path, d.text, offset=d.offset, exit_bits=16) for d in image.damage]
    result.failed += [
        InputError(source.path, state.why, offset=state.vcpu.offset, exit_bits=16)
        for state in recording.states
        if state.stand.where == "unreadable"
    ]
    scan = recording.tasks.scan if recording.tasks is not None else None
    found = Inspection(source.path, image, recording.states, result, recording.task_states if tasks else None, scan)
    if scan is not None and not scan.switch:
        text = "--tasks: the kernel is none whose sleeping tasks xtrace can tell (Linux since 4.9): nothing is said of them"
        result.failed.append(InputError(source.path, text, exit_bits=16))
    if found.undecided:
        which = "1 saved frame on a hypercall instruction" if found.undecided == 1 else f"{found.undecided:,} saved frames on one"
        result.notes.append(f"{which} may belong to a parked task: whether it is in use cannot be told, and it is not judged")
    return found


def _role(path: str) -> str:
    """Return the role of the saved domain: a guest, unless a sidecar that names one domain says otherwise."""
    sidecar = config.load_sidecar(path)
    roles = [d.role for d in sidecar.domains.values() if d.role] if sidecar is not None else []
    return roles[0] if len(roles) == 1 else "guest"


class _Vcpus:
    """The vCPUs of an image as a recording; see `xtrace.ingest.base.Recording`."""

    def __init__(self, image: Image, path: str, tasks: Tasks | None = None) -> None:
        self._image, self._path, self.tasks = image, path, tasks
        self.format = f"image ({image.format})"
        self.ledger = Ledger(records=len(image.vcpus), samples=len(image.vcpus))
        self.observed = Observed(layout=image.format)
        self.note: str | None = None
        self.states: list[VcpuState] = []
        self.task_states: list[TaskState] = []
        self._release: str | None = None
        try:
            if image.xen is None:
                self.note = "the image does not say which Xen left it (converted from a legacy one?); --from names it"
            else:
                release.parse(image.xen)
                self.observed.release = image.xen
        except UnknownRelease:
            self.note = f"the image says that Xen {image.xen} wrote it, which xtrace does not know (--from names another)"

    def aim(self, sources: Sequence[str]) -> None:
        """Read the vCPUs as the newest of the possible sources does."""
        self._release = sources[-1]

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield one frame of ``schema.EVENTS``: the vCPUs that stand on a hypercall instruction with a number of one."""
        assert self._release is not None
        self.states = [_state(self._image.memory, vcpu, self._release) for vcpu in self._image.vcpus]
        if self.tasks is not None:
            memory = self._image.memory
            self.task_states = [TaskState(f, life, _state(memory, f.vcpu, self._release)) for f, life in self.tasks.found]
        # Frames that are not in use, or may not be, are nothing to be judged.
        held = [*self.states, *(task.state for task in self.task_states if task.life.live)]
        rows = [_event(seq, state) for seq, state in enumerate(held) if state.call and state.call.op < _NUMBERS]
        yield pl.DataFrame(rows, schema=EVENTS)

    def weigh(self, continuations: pl.DataFrame) -> pl.DataFrame:
        """Take back the proof of continuations whose frame is not proved to be in use."""
        weak = [t.frame.vcpu.offset for t in self.task_states if t.life.evidence != "proved"]
        if not weak:
            return continuations
        hit = pl.col("vcpu").is_null() & pl.col("offset").is_in(weak)
        lower = pl.lit("inferred", continuations.schema["evidence"])
        return continuations.with_columns(pl.when(hit).then(lower).otherwise(pl.col("evidence")).alias("evidence"))


def _event(seq: int, state: VcpuState) -> dict[str, Any]:
    assert state.call is not None
    vcpu = state.vcpu
    return {
        "seq": seq,
        "offset": vcpu.offset,
        "vcpu": vcpu.number if vcpu.number >= 0 else None,  # a task runs on none
        "caller": vcpu.caller,
        "kind": "sample",
        "op": state.call.op,
        **dict(zip(ARGS, state.call.args, strict=True)),
        "cut": 0,
        "rip": vcpu.registers["rip"],
        # Only a parked vCPU is a continuation: one that has not made its call, or may not have, is none to be judged.
        "on_insn": state.parked is True,
        "memory": [{"field": k, "value": v} for k, v in state.memory.items()] or None,
    }


def _state(memory: Memory, vcpu: Vcpu, source: str) -> VcpuState:
    """Say what a vCPU is at, read as ``source`` does."""
    state = VcpuState(vcpu, stand(memory, vcpu))
    where, insn = state.stand.where, state.stand.insn
    if where == "unreadable":
        state.parked, state.evidence = None, "unobservable"
        state.why = f"vCPU {vcpu.number}: the code at rip {vcpu.registers['rip']:#x} is not in the image, or not mapped"
    elif where == "past":
        state.why = f"rip is just past a {insn}: that call is complete, and whatever the registers hold is left over"
    elif where == "user":
        state.why = f"rip is on a {insn}, but in user mode, where that is no hypercall"
    elif where == "elsewhere":
        state.why = "rip is on no hypercall instruction"
    else:
        state.call = call_of(vcpu)
        _on_instruction(memory, state, source)
    if not vcpu.mode_told:
        state.why += f"; the core does not record the mode, taken as {vcpu.bits}-bit"
    return state


def _on_instruction(memory: Memory, state: VcpuState, source: str) -> None:
    vcpu, call, insn = state.vcpu, state.call, state.stand.insn
    assert call is not None
    if call.op >= _NUMBERS:
        state.evidence = "inferred"
        state.why = f"rip is on a {insn}, but rax ({call.op:#x}) is the number of no hypercall: none can be in progress"
        return
    state.memory = _memory(memory, vcpu, source, call.op, call.args, 0)
    states = States.of([call.args], {k: [v] for k, v in state.memory.items()})
    read = hv.Hypervisor(source, vcpu.caller).decode(call.op, states)
    before, shown = finished_entries(memory, vcpu, call.args[0]) if call.op == MULTICALL else (0, False)
    issued = None
    if before:
        size = 64 if vcpu.bits == 64 else 32
        first = (call.args[0] - before * size, call.args[1] + before, *call.args[2:])
        issued = States.of([first], {})
    side = judging.read_source(source, vcpu.caller, call.op, states, issued)
    state.reading = side.reading()[0]
    # Progress in the registers is Xen's own writing; in memory it may be left over from an earlier call.
    bare = hv.Hypervisor(source, vcpu.caller).decode(call.op, States.of([call.args]))
    held = bool(bare.marked[0]) or call.op == PAGING_DOMCTL_CONT
    behind = bool(read.marked[0]) or bool(side.inner)
    ran, left = executed(vcpu), state.memory.get("entry.result")
    never = int(read.status[0]) in (hv.NEVER, hv.ABSENT)
    if held:
        state.parked, state.evidence = True, "proved"
        state.why = f"rip is on the {insn}, and the registers hold progress, which only Xen writes there"
    elif ran is False:
        state.parked, state.evidence = False, "proved"
        state.why = f"rip is on the {insn}, which has not been executed: rcx is neither rip nor the address behind it"
    elif behind:
        state.parked, state.evidence = True, "proved"
        what = "the current entry of the multicall is marked as preempted" if side.inner else "the structure holds progress"
        state.why = f"rip is on the {insn}, and {what}"
    elif never:
        state.parked, state.evidence = False, "inferred"
        state.why = f"rip is on the {insn}, but {source} never leaves this call unfinished: it has not been made yet"
    elif ran:
        state.parked, state.evidence = True, "inferred"
        state.why = f"rip is on the {insn}, and rcx and r11 show that it was executed: Xen set rip back"
    elif before and shown and left == 0:
        state.parked, state.evidence = True, "inferred"
        state.why = f"rip is on the {insn}, and the {before:,} entries before the current one have their results"
    else:
        state.parked, state.evidence = None, "unobservable"
        state.why = f"rip is on the {insn}; nothing tells a call not yet made from one preempted before its first unit"
    if state.parked is not True and state.reading is not None:
        # A call not known to be in progress has none; entries that stand before its list are another's.
        plain = judging.read_source(source, vcpu.caller, call.op, states, None).reading()[0]
        state.reading = {**plain, "progress": None if never or ran is False else plain["progress"]}


def _memory(memory: Memory, vcpu: Vcpu, source: str, op: int, args: Sequence[int], depth: int) -> dict[str, int]:
    """Return the fields behind a call, those behind a multicall's current entry included."""
    command = None
    call = facts.lookup(source, vcpu.caller, op)
    if call.command and (call.command_at or "arg0") == "arg0":
        number = int(hv.Hypervisor(source, vcpu.caller).decode(op, States.of([list(args)])).number[0])
        command = number if number >= 0 else None
    found = memory_behind(memory, vcpu, op, command, args)
    if op == MULTICALL and depth < _NESTED and 0 <= found.get("entry.op", _NUMBERS) < _NUMBERS:
        inner = [found[f"entry.arg{k}"] for k in range(6)]
        behind = _memory(memory, vcpu, source, found["entry.op"], inner, depth + 1)
        found |= {f"entry.memory.{k}": v for k, v in behind.items()}
    return found
