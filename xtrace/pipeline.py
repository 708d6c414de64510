"""The only joiner: from trace files to findings (ingest → replay → analyze)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from xtrace import config, release
from xtrace.analyze import advice as advice_mod
from xtrace.analyze import exposure, findings, fleet, suppress, surface, trace_rules
from xtrace.analyze import targets as targets_mod
from xtrace.analyze.store import FrameStore
from xtrace.errors import InputError, InputErrors, UsageError
from xtrace.ingest import registry
from xtrace.ingest.base import Ledger, Observed, ReadOptions, Recording
from xtrace.ingest.source import HEAD_BYTES, Source
from xtrace.replay import facts, identify
from xtrace.replay.account import Account
from xtrace.replay.callers import CallerFill
from xtrace.replay.losses import Losses
from xtrace.replay.stitch import Stitcher
from xtrace.schema import CALLERS, CALLS, CONTINUATIONS, FINDINGS

if TYPE_CHECKING:
    import datetime
    import os

    from xtrace.config.suppressions import Suppression
    from xtrace.ingest.base import Reader
    from xtrace.ingest.follow import GrowingSource

__all__ = (
    "Input",
    "Options",
    "Replay",
    "Result",
    "SurfaceRow",
    "analyze",
    "analyze_recording",
    "events",
    "follow",
    "identify_trace",
    "open_input",
    "replay",
)

Progress = Callable[[int, int], None]

#: Continuations judged together; never changes a result.
_JUDGE_ROWS = 1 << 16

#: Continuations up to which ways between releases are looked for.
_WAY_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Options:
    """How to analyse; every field is optional.

    Attributes:
        source: release that wrote the trace (``--from``).
        targets: releases or series to judge against (``--to``).
        callers: caller ABI by domain; the key None is for all domains (``--caller``).
        tsc_khz: TSC frequency.
        host_info: file with ``xl info`` or ``xl dmesg`` text.
        batch_rows: events handled at once; never changes a result.
        keep_calls: keep the table of logical calls (memory grows with the trace).
        progress: called with (bytes done, bytes in all) while reading.
        input_format: format of the inputs (``registry.names()``); None: by content.
        one_recording: the inputs are parts of one recording (one file a pCPU, pieces of a rotated one): merge them by time.
        suppressions: findings that were accepted (``xtrace.config.suppressions``).
        today: the day on which suppressions may expire; None: the current one, in UTC.
        said_by: what said ``source``, for people.
        notes: what else the report must say.
        migration: kinds of migration that are asked about (``exposure.KINDS``); none: all of them.
        path: releases that the domains meet one after the other, the one that wrote the traces first; then ``source`` and
            ``targets`` are taken from it.
    """

    source: str | None = None
    targets: Sequence[str] = ()
    callers: Mapping[int | None, str] = field(default_factory=dict)
    tsc_khz: int | None = None
    host_info: str | None = None
    batch_rows: int = 1 << 18
    keep_calls: bool = False
    progress: Progress | None = None
    input_format: str | None = None
    one_recording: bool = False
    suppressions: Sequence[Suppression] = ()
    today: datetime.date | None = None
    said_by: str = "--from"
    notes: Sequence[str] = ()
    migration: Sequence[str] = ()
    path: Sequence[str] = ()


@dataclass(slots=True)
class Input:
    """One input: what it is, what was read of it and what was taken from where."""

    path: str
    format: str
    ledger: Ledger
    observed: Observed
    source_origin: str = ""
    sources: tuple[str, ...] = ()
    tsc_khz: int | None = None
    named: bool = False  # something said which release wrote it: the user, a sidecar, the host's information, its header
    domains: dict[int | None, tuple[str | None, str | None]] = field(default_factory=dict)  # caller, role
    losses: Losses = field(default_factory=Losses)

    @property
    def entries(self) -> int:
        """Hypercall entries of any kind."""
        return self.ledger.hypercalls + self.ledger.subcalls + self.ledger.vmmcalls + self.ledger.samples

    @property
    def incomplete(self) -> list[str]:
        """Why this input cannot be called complete."""
        ledger, why = self.ledger, []
        if ledger.truncated:
            why.append("it ends inside a record")
        if ledger.skipped_bytes:
            why.append(f"{ledger.skipped_bytes:,} bytes could not be read")
        if ledger.skipped_lines:
            why.append(f"{ledger.skipped_lines:,} lines could not be understood")
        if ledger.lost_records or ledger.lost_events:
            why.append(f"the recorder lost {ledger.lost_records:,} records")
        if ledger.nameless:
            why.append(f"{ledger.nameless:,} hypercalls' numbers are not in it")
        if not self.entries:
            why.append("there is no hypercall in it")
        return why


@dataclass(frozen=True, slots=True)
class SurfaceRow:
    """The surface verdict of one domain's use of one hypercall and sub-operation."""

    domid: int | None
    caller: str
    hypercall: str
    subop: str | None
    calls: int
    total: int | None
    role: str | None
    verdicts: tuple[surface.Surface, ...]
    open: bool = True  # some sub-operation of the hypercall may leave a continuation
    kinds: tuple[str, ...] = exposure.KINDS  # migrations that catch a continuation of it
    caught: bool = True  # by one of those that were asked about


@dataclass(slots=True)
class Result:
    """Everything an analysis found; tables are Polars frames."""

    inputs: list[Input]
    sources: tuple[str, ...]
    targets: targets_mod.Targets
    tally: findings.Tally
    surface: list[SurfaceRow]
    blind: list[dict[str, object]]
    assumptions: list[str]
    notes: list[str]
    calls: int
    proved: int
    inferred: int
    store: FrameStore
    calls_table: pl.DataFrame | None = None
    failed: list[InputError] = field(default_factory=list)
    suppressed: FrameStore = field(default_factory=lambda: FrameStore(suppress.SUPPRESSED))
    suppressions: list[suppress.Used] = field(default_factory=list)
    suppressed_at: dict[str, int] = field(default_factory=dict)  # target -> findings
    trace: list[trace_rules.TraceFinding] = field(default_factory=list)  # what is wrong with the inputs themselves
    migration: frozenset[str] = frozenset()
    advice: list[advice_mod.Advice] = field(default_factory=list)
    path: fleet.Path | None = None
    revised: bool = False  # of a followed trace: what was told as it appeared is not what the whole says

    @property
    def findings(self) -> pl.DataFrame:
        """All findings (``schema.FINDINGS``)."""
        return self.store.frame()

    @property
    def counted(self) -> list[str]:
        """Targets that count for the exit status."""
        return [t for t in self.targets.versions if t not in self.targets.rollback]

    def target_bits(self, target: str) -> int:
        """Return the exit bits of one target, continuations and surface together."""
        bits = self.tally.bits[target]
        for row in self.surface:
            if row.caught and any(target in v.targets and v.open for v in row.verdicts):
                bits |= exposure.EXIT_REVIEW
        return bits

    @property
    def bits(self) -> int:
        """Return the exit status (DESIGN §5)."""
        out = 0
        for t in self.counted:
            out |= self.target_bits(t)
        if self.path is not None:
            out |= self.path.bits
        if any(i.incomplete for i in self.inputs):
            out |= exposure.EXIT_INCOMPLETE
        for error in self.failed:
            out |= error.exit_bits
        for wrong in self.trace:
            out |= wrong.bits
        return out


def open_input(path: str | os.PathLike[str], options: Options) -> tuple[Source, Recording]:
    """Open one input and recognise its format.

    Raises:
        InputError: it cannot be read, or is no trace.
    """
    source = Source(path)
    try:
        return source, _recording(source, options)
    except Exception:
        source.close()
        raise


def _recording(source: Source, options: Options) -> Recording:
    """Begin to read a source, from its first byte; a source may be read several times."""
    recording = registry.detect(source, options.input_format).open(source, ReadOptions(options.batch_rows, options.tsc_khz))
    if options.input_format and (other := registry.contradicted(source, options.input_format)):
        recording.ledger.problem(f"by its content it is {other}, but --input-format says {options.input_format}", offset=0)
    if source.damage:
        recording.ledger.truncated = True
        recording.ledger.problem(source.damage, offset=source.size)
    return recording


def _judged(
    rows: pl.DataFrame, index: int, context: findings.Context, tally: findings.Tally,
    set_aside: Callable[[pl.DataFrame, Sequence[str]], pl.DataFrame] | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Judge continuations of the input ``index`` (or, of several that make up one recording, the first one's index).

    What ``set_aside`` takes out of the findings is counted among the outcomes, and not for the exit status.
    """
    parts = []
    for some in rows.iter_slices(_JUDGE_ROWS):
        some = some.with_columns(pl.col("input").fill_null(0) + pl.lit(index, pl.UInt32))
        mine = findings.Tally.of(context.targets)
        found = findings.judge_continuations(some, context, mine)
        if set_aside is not None:
            found = set_aside(found, context.sources)
            mine.bits.update(dict.fromkeys(mine.bits, 0) | suppress.bits(found))
        tally.merge(mine)
        parts.append(found)
    return pl.concat(parts) if parts else pl.DataFrame(schema=FINDINGS)


def _recognised(source: GrowingSource, name: str | None) -> Reader:
    """Recognise the format of an input that grows, by the first bytes; where they do not tell yet, by some more."""
    while True:
        size = source.size
        try:
            return registry.detect(source, name)
        except InputError:
            if size >= HEAD_BYTES or not source.wait(size, patience=2.0):
                raise


def _together(sources: Sequence[Source], options: Options) -> Recording:
    """Begin to read the inputs of one recording."""
    recordings = [_recording(source, options) for source in sources]
    if len(recordings) == 1:
        return recordings[0]
    from xtrace.ingest.together import Together

    return Together(recordings, [source.path for source in sources])


def _names(paths: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(map(str, paths))


def _parts(item: Input, paths: Sequence[str | os.PathLike[str]], recording: Recording) -> list[Input]:
    """Return one Input for each file of a recording; they share what is known of its domains."""
    recordings = getattr(recording, "recordings", None)
    if recordings is None:
        return [item]
    return [
        replace(item, path=str(path), format=r.format, ledger=r.ledger, observed=r.observed, losses=Losses())
        for path, r in zip(paths, recordings, strict=True)
    ]


def events(path: str | os.PathLike[str], options: Options | None = None) -> Iterator[pl.DataFrame]:
    """Yield the events of one trace (``schema.EVENTS``) in batches."""
    source, recording = open_input(path, options or Options())
    with source:
        yield from recording.batches()


def analyze(paths: Sequence[str | os.PathLike[str]], options: Options | None = None) -> Result:
    """Analyse one or more traces of one host.

    Raises:
        InputError: an input cannot be used at all.
        UsageError: an option names something that does not exist.
    """
    options = options or Options()
    if not paths:
        raise UsageError("no trace was named")
    run = _begun(options)
    failed: list[InputError] = []
    for group in [list(paths)] if options.one_recording else [[path] for path in paths]:
        try:
            run.read(group)
        except InputError as exc:
            if options.one_recording:
                raise
            # The others are still worth reading.
            failed.append(exc)
    if len(failed) == len(paths):
        raise failed[0] if len(failed) == 1 else InputErrors(failed)
    result = run.result()
    result.failed = failed
    return result


def analyze_recording(
    path: str,
    recording: Recording,
    options: Options | None = None,
    *,
    role: str | None = None,
    aim: Callable[[Sequence[str]], None] | None = None,
    weigh: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
) -> Result:
    """Analyse one recording that is open already, of calls whose domain is not numbered (a saved guest's vCPUs).

    Args:
        path: its name, beside which a sidecar may stand.
        recording: read once, after ``aim``.
        options: of an analysis.
        role: of the domain (`exposure.ROLES`).
        aim: called with the releases that may have left it, before the recording is read.
        weigh: given continuations (``schema.CONTINUATIONS``), returns them with what evidence the recording's reader has for each.
    """
    options = options or Options()
    for text in options.targets:
        release.parse(text)
    run = _Run(options, None, release.parse(options.source) if options.source else None)
    run.roles[None], run.weigh = role, weigh
    sidecar = config.load_sidecar(path)
    item = Input(path, recording.format, recording.ledger, recording.observed)
    if not run._release(item, sidecar):
        run._release_from(item, identify.Identifier({}))
    run.sources = item.sources
    run._domains(item, sidecar)
    run._aim(targets_mod.choose(item.sources, options.targets))
    run.inputs.append(item)
    if aim is not None:
        aim(item.sources)
    run._stream(0, item, [item], 0, recording)
    return run.result()


def _begun(options: Options) -> _Run:
    """Check the options and begin; a wrong name must not be found out after gigabytes."""
    for caller in options.callers.values():
        if caller not in CALLERS:
            raise UsageError(f"no caller is called {caller!r}; there are {', '.join(CALLERS)}")
    host = config.read_host_info(options.host_info) if options.host_info else None
    given = release.parse(options.source) if options.source else None
    for text in options.targets:
        release.parse(text)
    if options.path:
        options, given = _along(options, given)
    return _Run(options, host, given)


def _along(options: Options, given: release.Selection | None) -> tuple[Options, release.Selection]:
    """Take source and targets from the path."""
    hosts = fleet.hosts_of(options.path)
    if options.targets:
        raise UsageError("--path names the targets; leave out --to")
    first = release.parse(hosts[0])
    if given is not None and [r.version for r in given.releases] != [hosts[0]]:
        raise UsageError(f"--path begins with {hosts[0]}, but {options.said_by} names another release that wrote the trace")
    said = options.said_by if given is not None else "--path"
    return replace(options, source=hosts[0], targets=hosts[1:], said_by=said), first


def follow(
    path: str | os.PathLike[str],
    options: Options | None = None,
    *,
    found: Callable[[pl.DataFrame], None],
    idle: float | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Result:
    """Analyse a trace that is still being written.

    Args:
        path: a file that grows, or ``-``.
        options: as for :func:`analyze`.
        found: called with new findings (``schema.FINDINGS``) as they appear.
        idle: seconds without growth after which the trace is taken as ended; None: never.
        stopped: asked whether to end.

    Raises:
        InputError: it cannot be read, or nothing comes.
        UsageError: its format needs the whole input.
    """
    options = options or Options()
    if options.path:
        raise UsageError("--follow goes with --to, not with --path")
    from xtrace.ingest.follow import GrowingSource

    run = _begun(options)
    run.found = found
    with GrowingSource(path, idle=idle, stopped=stopped) as source:
        run.follow(source)
        if not run.revised:
            return run.result()
        # What was told is not all that can be said now: the report is that of the whole.
        whole = _begun(options)
        with source.snapshot() as now:
            whole.read([path], [now])
            whole.notes[f"{run.revised}: all of it was read again for this report, which replaces what was told before"] = None
            result = whole.result()
            result.revised = True
            return result


class _Run:
    """State of one analysis."""

    def __init__(self, options: Options, host: config.HostInfo | None, given: release.Selection | None) -> None:
        self.options, self.host, self.given = options, host, given
        self.inputs: list[Input] = []
        self.seen: list[pl.DataFrame] = []
        self.assumptions: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.store = FrameStore(FINDINGS)
        self.targets: targets_mod.Targets | None = None
        self.tally: findings.Tally | None = None
        self.sources: tuple[str, ...] = ()
        self.roles: dict[int | None, str | None] = {None: None, 0: "control"}
        self.calls = self.proved = self.inferred = 0
        self.found: Callable[[pl.DataFrame], None] | None = None  # told of findings as they appear
        self.known: dict[int | None, tuple[str | None, str | None]] = {}  # caller, role of domains before an input is read
        self.judged_as: dict[int, str | None] = {}  # role of each domain whose findings were told
        self.revised = ""  # why what was told as it appeared is not what the whole says
        self.weigh: Callable[[pl.DataFrame], pl.DataFrame] | None = None
        self.tables: list[pl.DataFrame] = []
        self.suppressor = suppress.Suppressor(options.suppressions, options.today)
        self.suppressed = FrameStore(suppress.SUPPRESSED)
        self.suppressed_at: dict[str, int] = {}
        self.trace: list[trace_rules.TraceFinding] = []
        self.migration = exposure.parse_kinds(options.migration)
        self.caught: list[tuple[int, FrameStore]] = []  # continuations, each with the number of its input
        self.breaking: pl.DataFrame | None = None  # operations that break, and where

    def follow(self, source: GrowingSource) -> None:
        """Read one input that still grows, from what is there to its end."""
        sidecar = config.load_sidecar(source.path)
        options = replace(self.options, tsc_khz=self._khz(sidecar))
        reader = _recognised(source, options.input_format)
        if not getattr(reader, "streams", False):
            raise UsageError(f"--follow: {source.path} is read as {reader.name}, which needs the whole input")
        options = replace(options, input_format=reader.name)  # more of it might look like something else
        recording = _recording(source, options)
        item = Input(str(source.path), recording.format, recording.ledger, recording.observed, tsc_khz=options.tsc_khz)
        told = self._release(item, sidecar)
        if not told:
            # What is there by now must do: it cannot wait for the end.
            with source.snapshot() as now:
                seen, past = identify.Identifier(_told_callers(self.options, sidecar)), _recording(now, options)
                for batch in past.batches():
                    seen.feed(batch)
                item.observed = past.observed
                self._release_from(item, seen)
            item.observed = recording.observed
        self.sources = item.sources
        self._domains(item, sidecar)
        self._aim(targets_mod.choose(item.sources, self.options.targets))
        self.inputs.append(item)
        checks = self._checks(item, sidecar)
        # Which releases are left is asked again at the end, of all that came.
        seen = identify.Identifier(_told_callers(self.options, sidecar))
        self._stream(0, item, [item], source.size, recording, checks, None if told else seen)
        self._of_ledgers(0, [item])
        item.tsc_khz = item.tsc_khz or recording.observed.tsc_khz
        if getattr(recording, "provisional", False):
            self.revised = "some of it came late or damaged"
        elif not told and item.sources != self._left(item, seen):
            self.revised = "what came later says more of the release that wrote it"
        elif any(self.roles.get(domid) != role for domid, role in self.judged_as.items()):
            self.revised = "what came later says what a domain is"

    def _left(self, item: Input, seen: identify.Identifier) -> tuple[str, ...]:
        """Return the releases that all of a trace leaves possible."""
        if item.observed.release:
            return tuple(r.version for r in release.parse(item.observed.release).releases)
        return _possible(item, seen)

    def read(self, paths: Sequence[str | os.PathLike[str]], opened: Sequence[Source] = ()) -> None:
        """Read one recording, of one or more inputs (``opened`` already or not), through to findings."""
        sidecar = next((s for s in map(config.load_sidecar, paths) if s is not None), None)
        khz = self._khz(sidecar)
        options = replace(self.options, tsc_khz=khz)
        with ExitStack() as stack:
            sources = [*opened] or [stack.enter_context(Source(path)) for path in paths]
            recording = _together(sources, options)
            item = Input(_names(paths), recording.format, recording.ledger, recording.observed, tsc_khz=khz)
            if not self._release(item, sidecar):
                # Its header may stand anywhere in a text log, and every record helps to tell the era of a binary one.
                seen = identify.Identifier(_told_callers(self.options, sidecar))
                for batch in recording.batches():
                    if recording.observed.release is None:
                        seen.feed(batch)
                self._release_from(item, seen)
                recording = _together(sources, options)
                item.ledger, item.observed = recording.ledger, recording.observed
            self.sources = item.sources
            self._domains(item, sidecar)
            targets = targets_mod.choose(item.sources, self.options.targets)
            if self.targets is None or self.targets.versions != targets.versions:
                self._aim(targets)
            parts = _parts(item, paths, recording)
            index = len(self.inputs)
            self.inputs += parts
            self._stream(index, item, parts, sum(s.size for s in sources), recording, self._checks(item, sidecar))
            self._of_ledgers(index, parts)
            for part in parts:
                if part.tsc_khz is None:
                    part.tsc_khz = recording.observed.tsc_khz

    def _khz(self, sidecar: config.Sidecar | None) -> int | None:
        for value in (self.options.tsc_khz, sidecar and sidecar.tsc_khz, self.host and self.host.tsc_khz):
            if value:
                return int(value)
        return None

    def _aim(self, targets: targets_mod.Targets) -> None:
        if self.targets is not None:
            raise UsageError("the traces come from different releases; analyse them one by one, or name --to")
        self.targets, self.tally = targets, findings.Tally.of(targets.versions)
        for note in targets.notes:
            self.notes[note] = None

    def _release(self, item: Input, sidecar: config.Sidecar | None) -> bool:
        """Take the release from outside the trace, if it is said there."""
        if self.given is not None:
            chosen, item.source_origin = self.given, self.options.said_by
        elif sidecar is not None and sidecar.release:
            chosen, item.source_origin = release.parse(sidecar.release), f"the sidecar {sidecar.path}"
        elif self.host is not None and self.host.release:
            chosen, item.source_origin = release.parse(self.host.release), str(self.options.host_info)
        else:
            return False
        self._chosen(item, chosen)
        return True

    def _release_from(self, item: Input, seen: identify.Identifier) -> None:
        """Take the release from the trace's own header, else every one that its records leave possible."""
        if item.observed.release:
            item.source_origin = "the trace's own header"
            self._chosen(item, release.parse(item.observed.release))
            return
        item.sources = _possible(item, seen)
        item.source_origin = f"record layout {item.observed.layout or 'of no era of its own'}"
        said = f"nothing says which release wrote {item.path}: judged for each of {release.fold_text(item.sources)}"
        self.assumptions[f"{said} ({item.source_origin}); --from names it"] = None

    def _chosen(self, item: Input, chosen: release.Selection) -> None:
        item.named = True
        item.sources = tuple(r.version for r in chosen.releases)
        if chosen.note:
            self.notes[chosen.note] = None

    def _domains(self, item: Input, sidecar: config.Sidecar | None) -> None:
        """Gather what is known of the domains: the user goes before the sidecar, the sidecar before the recording."""
        known: dict[int | None, tuple[str | None, str | None]] = {0: (None, "control")}
        for domid, d in item.observed.domains.items():
            known[domid] = (d.caller, d.role or known.get(domid, (None, None))[1])
        for domid, info in (sidecar.domains if sidecar is not None else {}).items():
            caller, role = known.get(domid, (None, None))
            known[domid] = (info.caller or caller, info.role or role)
        for key, caller_ in self.options.callers.items():
            if key is not None:
                known[key] = (caller_, known.get(key, (None, None))[1])
        item.domains, self.known = known, dict(known)
        self.roles.update({key: role for key, (_, role) in known.items()})

    def _heard(self, item: Input, observed: Observed) -> None:
        """Take the roles that the input itself told while it was read, where nothing better is known."""
        for domid, d in observed.domains.items():
            caller, role = self.known.get(domid, (None, None))  # not what it told before: it may tell something else now
            item.domains[domid] = (caller or d.caller, role or d.role)
            self.roles[domid] = role or d.role

    def _checks(self, item: Input, sidecar: config.Sidecar | None) -> trace_rules.Checks:
        """Begin to look at what is wrong with a recording itself."""
        return trace_rules.Checks(item.sources, item.source_origin if item.named else None, _told_callers(self.options, sidecar))

    def _of_ledgers(self, index: int, parts: Sequence[Input]) -> None:
        """Add what the ledgers show; complete once everything was read."""
        for n, part in enumerate(parts):
            lost = next(((s.offset, s.line) for s in part.losses.spans), (None, None))
            places = [lost, *((p.offset, p.line) for p in part.ledger.problems[:1])]
            self.trace += trace_rules.of_ledger(index + n, part.ledger, entries=part.entries, places=places)

    def _set_aside(self, found: pl.DataFrame, sources: Sequence[str]) -> pl.DataFrame:
        """Take out the findings that were accepted; they are kept apart."""
        if not self.suppressor:
            return found
        kept, taken = self.suppressor.split(found, sources)
        self.suppressed.add(taken)
        for target, n in taken.explode("targets").group_by("targets").len().iter_rows():
            self.suppressed_at[target] = self.suppressed_at.get(target, 0) + n
        return kept

    def _stream(
        self, index: int, item: Input, parts: Sequence[Input], size: int, recording: Recording,
        checks: trace_rules.Checks | None = None, identifier: identify.Identifier | None = None,
    ) -> None:  # fmt: skip
        tally = self.tally
        assert tally is not None
        assert self.targets is not None
        fill = CallerFill(
            everyone=self.options.callers.get(None),
            domains={k: c for k, (c, _) in item.domains.items() if c is not None and k is not None},
        )
        stitcher = Stitcher(item.sources[-1], calls=self.calls)
        context = findings.Context(item.sources, self.targets.versions, self.targets.rollback, self.roles, migration=self.migration)
        # Judged once everything is read: what the input says of its domains may stand at its end.
        found = FrameStore(CONTINUATIONS)
        self.caught.append((index, found))
        for part in parts:
            part.losses.intervals = self.options.keep_calls
        for batch in recording.batches():
            for n, part in enumerate(parts):
                part.losses.feed(batch if len(parts) == 1 else batch.filter(pl.col("input") == n))
            stitched = stitcher.feed(fill.fill(batch))
            if self.weigh is not None:
                weighed = self.weigh(stitched.continuations)
                lower = int((weighed["evidence"] != stitched.continuations["evidence"]).sum())
                stitcher.proved, stitcher.inferred = stitcher.proved - lower, stitcher.inferred + lower
                stitched.continuations = weighed
            if checks is not None:
                checks.feed(batch, stitched)
            self.seen.append(surface.collect(stitched.entries, index))
            if len(self.seen) > 64:
                self.seen = [surface.merge(self.seen)]
            if self.found is not None:
                self._heard(item, recording.observed)
                for domid in stitched.continuations["domid"].unique().drop_nulls().to_list():
                    self.judged_as.setdefault(domid, self.roles.get(domid))
                if identifier is not None:
                    identifier.feed(batch)
                self.store.add(new := _judged(stitched.continuations, index, context, tally, self._set_aside))
                self.found(new)
            else:
                found.add(stitched.continuations)
            if self.options.keep_calls:
                self.tables.append(_call_rows(stitched.entries, index))
            if self.options.progress is not None and len(batch):
                self.options.progress(int(batch.get_column("offset").max() or 0), size)  # type: ignore[arg-type]
        self._heard(item, recording.observed)
        if checks is not None:
            seen = checks.identifier
            self.trace += checks.findings(index, None if seen is None else _concluded(item, seen))
        for rows in found.batches():
            self.store.add(_judged(rows, index, context, tally, self._set_aside))
        self.calls = stitcher.calls
        self.proved += stitcher.proved
        self.inferred += stitcher.inferred
        for domid, caller in fill.used:
            item.domains[domid] = (caller, self.roles.get(domid, self.roles[None]))
        for domid, caller in sorted(fill.assumed, key=str):
            who = f"domain {domid}" if domid is not None else "calls of unknown domains"
            self.assumptions[f"{who} taken as {caller}: the trace does not say (--caller sets it)"] = None

    def result(self) -> Result:
        """Put everything together."""
        assert self.targets is not None
        assert self.tally is not None
        seen = surface.merge(self.seen).sort("domid", "caller", "op", "number", nulls_last=True)
        # Of a call without a number nothing can be said; how many there are is among what the trace could not show.
        rows = self._surfaces(seen, self.sources, self.targets.versions)
        rows = self.suppressor.split_surface(rows, self.sources)
        path = self._path(seen, rows)
        trace = self.suppressor.accept(self.trace, self.sources)
        said = [*self.options.notes, *self.notes, *(note for u in self.suppressor.used if (note := u.note) is not None)]
        calls = None
        if self.options.keep_calls:
            calls = _calls(self.tables, [item.losses for item in self.inputs])
        result = Result(
            self.inputs, self.sources, self.targets, self.tally, rows, self._blind(rows), list(self.assumptions),
            said, self.calls, self.proved, self.inferred, self.store, calls,
            trace=sorted(trace, key=lambda f: (f.input, f.code)), suppressed=self.suppressed,
            suppressions=self.suppressor.used, suppressed_at=self.suppressed_at, migration=self.migration, path=path,
        )  # fmt: skip
        result.advice = self._advice(result, seen)
        return result

    def _surfaces(self, seen: pl.DataFrame, sources: Sequence[str], targets: Sequence[str]) -> list[SurfaceRow]:
        """Judge what each call that was seen could leave at one of ``sources``."""
        # Of a call without a number nothing can be said; how many there are is among what the trace could not show.
        return [self._surface(row, sources, targets) for row in seen.drop_nulls("op").iter_rows(named=True)]

    def _path(self, seen: pl.DataFrame, rows: Sequence[SurfaceRow]) -> fleet.Path | None:
        """Judge every pair of hosts of ``--path``; what a host between would leave is added to the findings."""
        hosts = fleet.hosts_of(self.options.path) if self.options.path else ()
        if not hosts:
            return None
        assert self.tally is not None
        tally, stores, legs = self.tally, self.caught, []
        for i, left in enumerate(hosts[:-1]):
            later = tuple(dict.fromkeys(hosts[i + 1 :]))
            if i:
                driven = []
                context = findings.Context((left,), later, frozenset(), self.roles, migration=self.migration)
                tally = findings.Tally.of(later)
                for index, store in stores:
                    again = FrameStore(CONTINUATIONS)
                    for batch in store.batches():
                        again.add(some := fleet.driven(batch, hosts[i - 1], left, self.roles))
                        self.store.add(_judged(some, index, context, tally, self._set_aside))
                    driven.append((index, again))
                stores = driven
                rows = self.suppressor.split_surface(self._surfaces(seen, (left,), later), (left,))
            for j in range(i + 1, len(hosts)):
                names = tuple(dict.fromkeys(
                    f"{r.hypercall}/{r.subop}" if r.subop else r.hypercall
                    for r in rows if r.caught and any(hosts[j] in v.targets and v.open for v in r.verdicts)
                ))  # fmt: skip
                bits = tally.bits[hosts[j]] | (exposure.EXIT_REVIEW if names else 0)
                legs.append(fleet.Leg(left, hosts[j], j == i + 1, dict(tally.counts[hosts[j]]), tuple(sorted(names)), bits))
        return fleet.Path(hosts, tuple(legs))

    def _advice(self, result: Result, seen: pl.DataFrame) -> list[advice_mod.Advice]:
        """Say what to do about it."""
        assert self.tally is not None
        counted = result.counted
        broken = {t: self._broken(result, t) for t in counted} if any(map(result.target_bits, counted)) else {}
        by_kind = {t: dict(self.tally.by_kind[t]) for t in counted}
        for row in result.surface:
            for t in {t for v in row.verdicts if v.open for t in v.targets} & set(counted):
                for kind in row.kinds:
                    by_kind[t][kind] |= exposure.EXIT_REVIEW
        counts = [self.tally.counts[t] for t in counted]
        ways: dict[tuple[str | None, str], bool] = {}

        calls = sorted({(str(c), int(op)) for c, op in seen.select("caller", "op").drop_nulls().iter_rows()})

        def alike(version: str) -> object:
            return tuple(facts.lookup(version, c, op).fingerprint for c, op in calls)

        def way(left: str | None, host: str) -> bool:
            if (left, host) not in ways:
                ways[left, host] = self._way(result, seen, left, host)
            return ways[left, host]

        return advice_mod.advise(
            advice_mod.Seen(
                self.sources, tuple(counted), {t: result.target_bits(t) for t in counted},
                {t: broken.get(t, ()) for t in counted}, by_kind, self.migration,
                tuple(str(b["hypercall"]) for b in result.blind if b["what"] == "sub-operation"),
                any("undecidable" in c for c in counts), sum(i.entries for i in self.inputs), alike, way,
            )
        )  # fmt: skip

    def _broken(self, result: Result, target: str) -> tuple[str, ...]:
        """Return the operations of which something that was seen, or could have been left, breaks at a target."""
        if self.breaking is None:
            self.breaking = pl.concat([
                pl.DataFrame(schema={"hypercall": pl.String, "subop": pl.String, "targets": pl.String}),
                *(_breaks(batch).select("hypercall", "subop", "targets").explode("targets").unique()
                  for batch in self.store.batches()),
            ]).unique(maintain_order=True)  # fmt: skip
        names = {
            f"{h}/{s}" if s else str(h)
            for h, s in self.breaking.filter(pl.col("targets") == target).select("hypercall", "subop").iter_rows()
        }
        for row in result.surface:
            if row.caught and any(v.open and v.verdict == "breaks" and target in v.targets for v in row.verdicts):
                names.add(f"{row.hypercall}/{row.subop}" if row.subop else row.hypercall)
        return tuple(sorted(names))

    def _way(self, result: Result, seen: pl.DataFrame, left: str | None, host: str) -> bool:
        """Say whether all that was seen resumes at ``host`` if ``left`` (None: a source) left it last."""
        if sum(store.count for _, store in self.caught) > _WAY_ROWS or (self.found is not None and not self.options.path):
            return False  # nothing is said that was not computed
        if left is None and host in result.targets.versions:
            rows: Sequence[SurfaceRow] = result.surface
        else:
            rows = self._surfaces(seen, self.sources if left is None else (left,), (host,))
        if any(r.caught and any(v.open and host in v.targets for v in r.verdicts) for r in rows):
            return False
        context = findings.Context(
            self.sources if left is None else (left,), (host,), frozenset(), self.roles, migration=self.migration
        )
        for index, store in self.caught:
            for batch in store.batches():
                some = batch if left is None else fleet.driven(batch, self.sources[-1], left, self.roles)
                got = _judged(some, index, context, findings.Tally.of((host,)))
                if len(_breaks(got)) or (got.get_column("outcome") == "undecidable").any():
                    return False
        return True

    def _surface(self, row: Mapping[str, object], sources: Sequence[str], targets: Sequence[str]) -> SurfaceRow:
        op, caller, domid = int(str(row["op"])), str(row["caller"]), row["domid"]
        number = None if row["number"] is None else int(str(row["number"]))
        total = None if row["untotalled"] or row["total"] is None else int(str(row["total"]))
        role = self.roles.get(None if domid is None else int(str(domid)), self.roles[None])
        exposed = exposure.expose(role, None, caller)
        # Where several releases may be the source, one that breaks is enough to ask for a review.
        verdicts: dict[str, surface.Surface] = {}
        for source in _ways_of_surface(sources, op, caller):
            still = [t for t in targets if t not in verdicts or verdicts[t].verdict == "safe"]
            for v in surface.judge(source, caller, op, number, total, still, exposed.issuer) if still else ():
                for t in v.targets:
                    if t not in verdicts or v.verdict != "safe":
                        verdicts[t] = v
        grouped: dict[int, tuple[surface.Surface, list[str]]] = {}
        for t, v in verdicts.items():
            grouped.setdefault(id(v), (v, []))[1].append(t)
        subop = facts.operation_label(op, number)
        return SurfaceRow(
            None if domid is None else int(str(domid)), caller, facts.lookup(sources[-1], caller, op).name, subop,
            int(str(row["calls"])), total, role,
            tuple(
                surface.Surface(tuple(ts), v.verdict, v.outcomes, v.breaking, v.caveats, v.unknown)
                for v, ts in grouped.values()
            ),
            any(surface.continues(source, caller, op) for source in sources),
            exposed.kinds, exposure.caught(exposed.kinds, self.migration),
        )  # fmt: skip

    def _blind(self, rows: Sequence[SurfaceRow]) -> list[dict[str, object]]:
        """List what the traces could not show."""
        out: list[dict[str, object]] = []
        hidden: dict[str, int] = {}
        names = {facts.hypercall_names().get(k) for k in facts.command_hypercalls()}
        for row in rows:
            if row.subop is None and row.hypercall in names and row.open:
                hidden[row.hypercall] = hidden.get(row.hypercall, 0) + row.calls
        for name, n in sorted(hidden.items()):
            out.append({"what": "sub-operation", "hypercall": name, "calls": n,
                        "why": "the recorder does not write the arguments of this hypercall"})  # fmt: skip
        for item in self.inputs:
            if item.format in registry.names() and (partial := registry.reader(item.format).shows.partial):
                out.append({"what": "hypercall", "hypercall": None, "calls": None, "why": f"{item.path}: {partial}"})
            if item.ledger.unattributed:
                out.append({"what": "domain", "hypercall": None, "calls": item.ledger.unattributed,
                            "why": f"{item.path}: no scheduling record says which vCPU ran"})  # fmt: skip
            for why in item.incomplete:
                out.append({"what": "loss", "hypercall": None, "calls": None, "why": f"{item.path}: {why}"})
        return out


def _ways_of_surface(sources: Sequence[str], op: int, caller: str) -> list[str]:
    """Return one release for each way in which the possible sources treat a hypercall."""
    from xtrace.analyze.judging import classes

    return [group[0] for group in classes(op, caller, sources)]


def _breaks(found: pl.DataFrame) -> pl.DataFrame:
    """Return the findings that are breaks and count."""
    broken = pl.col("outcome").is_in(sorted(exposure.BREAKS)) & ~((pl.col("outcome") == "restarts") & pl.col("harmless"))
    return found.filter(broken & (pl.col("bits") > 0))


class Replay:
    """One trace replayed at one release; iterate ``batches`` once."""

    def __init__(self, path: str, release_: str, options: Options) -> None:
        """Remember what to replay."""
        self.path, self.options = path, options
        self.account = Account(release_)
        self.assumptions: list[str] = []
        self.input: Input | None = None

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield rows of ``replay.account.ACCOUNT``."""
        sidecar = config.load_sidecar(self.path)
        source, recording = open_input(self.path, self.options)
        with source:
            self.input = Input(self.path, recording.format, recording.ledger, recording.observed)
            known = {k: d.caller for k, d in recording.observed.domains.items() if d.caller}
            known |= {k: d.caller for k, d in (sidecar.domains if sidecar is not None else {}).items() if d.caller}
            known |= {k: c for k, c in self.options.callers.items() if k is not None}
            fill = CallerFill(self.options.callers.get(None), known)
            stitcher = Stitcher(self.account.release)
            for batch in recording.batches():
                self.input.losses.feed(batch)
                yield self.account.take(stitcher.feed(fill.fill(batch)))
        for domid, caller in sorted(fill.assumed, key=str):
            who = f"domain {domid}" if domid is not None else "calls of unknown domains"
            self.assumptions.append(f"{who} taken as {caller}")

    @property
    def bits(self) -> int:
        """Return the exit status."""
        out = 0
        if self.account.divergence is not None or self.account.counts.get("unknown"):
            out |= exposure.EXIT_REVIEW
        if self.account.nameless or (self.input is not None and self.input.incomplete):
            out |= exposure.EXIT_INCOMPLETE
        return out


def replay(path: str | os.PathLike[str], at: str, options: Options | None = None) -> Replay:
    """Prepare the replay of one trace at release ``at``."""
    return Replay(str(path), release.get(at).version, options or Options())


def identify_trace(path: str | os.PathLike[str], options: Options) -> tuple[Input, identify.Identification]:
    """Read one trace for what it says about the release that wrote it.

    Args:
        path: the trace; ``-`` is standard input.
        options: callers, TSC frequency, size of batches and progress are taken from them.
    """
    callers = _told_callers(options, config.load_sidecar(path))
    source, recording = open_input(path, replace(options, callers=callers))
    seen = identify.Identifier(callers)
    item = Input(str(path), recording.format, recording.ledger, recording.observed)
    with source:
        for batch in recording.batches():
            item.losses.feed(batch)
            seen.feed(batch)
            if options.progress is not None and len(batch):
                options.progress(int(batch.get_column("offset").max() or 0), source.size)  # type: ignore[arg-type]
    return item, _concluded(item, seen)


def _concluded(item: Input, seen: identify.Identifier) -> identify.Identification:
    return seen.conclude(item.observed.event_ids, item.observed.forms, item.observed.peaks)


def _told_callers(options: Options, sidecar: config.Sidecar | None) -> dict[int | None, str]:
    """Return the callers that the user or the sidecar says, by domain (None: of all)."""
    said = sidecar.domains.items() if sidecar is not None else ()
    return {**{k: d.caller for k, d in said if d.caller}, **options.callers}


def _possible(item: Input, seen: identify.Identifier) -> tuple[str, ...]:
    """Return the releases that a trace leaves possible."""
    found = _concluded(item, seen)
    versions = found.left
    if not versions:
        raise InputError(item.path, found.contradiction(), exit_bits=16)
    # What no fact file speaks about cannot be judged at all; a source that is only possible is not worth an "unknown".
    return tuple(v for v in versions if v in facts.modelled_releases()) or versions


def _call_rows(entries: pl.DataFrame, index: int) -> pl.DataFrame:
    return entries.filter(pl.col("kind") != "subcall").select(
        "call", "seq", "offset", "line", "tsc", "domid", "vcpu", "caller", "op", "kind", "reentry", "by", "result", "pcpu",
        input=pl.lit(index),
    )  # fmt: skip


def _calls(parts: list[pl.DataFrame], losses: Sequence[Losses]) -> pl.DataFrame:
    """Fold the rows of each call into one. A call whose window, up to its vCPU's next event, overlaps a loss is inferred."""
    if not parts:
        return pl.DataFrame(schema=CALLS)
    who = pl.struct("input", "domid", "vcpu", pl.when(pl.any_horizontal(pl.col("domid", "vcpu").is_null())).then("pcpu"))
    rows = pl.concat(parts).with_columns(next=pl.col("tsc").shift(-1).over(who))
    hit = pl.Series("lossy", np.zeros(len(rows), bool))
    for index, lost in enumerate(losses):
        mine = rows.select(pl.col("input") == index).to_series()
        begin = rows.get_column("tsc").fill_null(0).to_numpy()
        end = rows.get_column("next").fill_null((1 << 64) - 1).to_numpy()
        hit |= mine & pl.Series(lost.overlaps(begin, end))
    rows = rows.with_columns(hit.alias("lossy")).filter(pl.col("call").is_not_null())
    entry = pl.col("kind").is_in(["hypercall", "vmmcall"])
    return (
        rows.group_by("call", maintain_order=True)
        .agg(
            pl.col("seq").first(),
            pl.col("seq").last().alias("last_seq"),
            *(pl.col(c).first() for c in ("offset", "line", "tsc", "domid", "vcpu", "caller", "op")),
            entry.sum().cast(pl.UInt32).alias("entries"),
            (pl.col("kind") == "sample").sum().cast(pl.UInt32).alias("samples"),
            pl.col("result").filter(pl.col("kind") == "return").last(),
            pl.when((pl.col("reentry") | pl.col("lossy")).any())
            .then(pl.lit("inferred"))
            .otherwise(pl.lit("proved"))
            .alias("evidence"),
            pl.col("by").filter(pl.col("reentry")).max(),  # they stand in order: the weakest
        )
        .cast({"evidence": CALLS["evidence"]})
        .select(CALLS.names())
    )
