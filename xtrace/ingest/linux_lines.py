"""Lines of Linux's tracers: ftrace's own text, ``trace-cmd report`` and ``perf script``, and what is before their fields.

One event a line (kernel/trace/trace_output.c trace_print_context, trace_print_lat_context; libtraceevent as trace-cmd 3.1
prints it; tools/perf/builtin-script.c print_sample_start)::

              sh-125     [001] d..1.    46.925295: xen_mmu_write_cr3: kernel cr3 65dc000      ftrace
              sh-125     (    125) [001] d..1.    46.925295: xen_mmu_…                        ftrace, record-tgid
          sh-125       1d..1.  46925295us : xen_mmu_…                                         ftrace, latency-format
       trace-cmd-204   [001]    68.574939: xen_mmu_set_pte:      ptep …                       trace-cmd report
      trace-cm-204     1d..3.    68.575293: xen_mc_batch:         start …                     trace-cmd report -l
              sh   125 [001]    46.925295: xen:xen_mmu_write_cr3: kernel …                    perf script
              sh   125/125      46.925295:          1 xen:xen_mmu_…                           perf script -F without cpu
              sh   125 [001] xen:xen_mmu_…                                                    perf script -F without time

* The CPU is the tracing kernel's own. Where it is not printed the thread stands for it.
* A stamp with a point is seconds of one of the kernel's clocks (``trace_clock`` local, global, mono, boot …; perf's own). One
  without is the TSC where the clock is ``x86-tsc``, and a count from 0 where it is ``counter``: below 10**8 it is no TSC of a
  booted machine and left out. ``trace-cmd report --raw-ts`` prints nanoseconds in that place, which looks like a TSC.
* ``latency-format`` prints the time since the buffer's start: never a TSC.
"""

from __future__ import annotations

from typing import Final

import polars as pl

from xtrace.ingest.lines import by_value

__all__ = ("EVENT_LINE", "LOST", "RARE_LINE", "WRITTEN", "losses", "parse", "times")

#: An event line of most of these tools, told apart from other text as cheaply as can be, and of the rarer forms.
EVENT_LINE: Final = r"\[[0-9]{1,5}\](?: +[^ ]+)? +[0-9]+(?:\.[0-9]+)?: "
RARE_LINE: Final = (
    r"^[^#].*[0-9]us.?: |^[^#].*[dDbX.][^ ]{3,6} +[0-9]+(?:\.[0-9]+)?: +[\w-]+:|^[^#].* [0-9]+\.[0-9]{6,9}: +(?:[0-9]+ +)?[\w:-]+:"
    r"|\[[0-9]{1,5}\] +(?:kernel|xen|kvm):[\w-]+: "
)
_STAMP: Final = r"([0-9]{1,20})(?:\.([0-9]{1,9}))?"
# Everything before the first ": ".
_HEAD: Final = rf"\[([0-9]{{1,5}})\](?: +[^ ]+)? +{_STAMP}$"
_LATENCY: Final = rf"-[0-9]+ +([0-9]{{1,5}})[dDbX.][^ ]{{3,6}} +{_STAMP}(us.?)?$"
_THREAD: Final = r"(?:^| )([0-9]{1,10})(?:/([0-9]{1,10}))? +([0-9]{1,12})\.([0-9]{6,9})$"
_UNTIMED: Final = r"\[([0-9]{1,5})\] +(?:[\w-]+:)?([\w-]+)$"
# The name of the event: perf puts its group before it, and the period before that.
_EVENT: Final = r"([\w-]+)$"
# A task's name may hold ": ".
_WHOLE: Final = rf"^.*\[([0-9]{{1,5}})\](?: +[^ ]+)? +{_STAMP}: +(?:[0-9]+ +)?(?:[\w-]+:)?([\w-]+): +(.*)$"
_LEAST_TSC: Final = 10**8

#: What ftrace and trace-cmd print where the buffer dropped events (kernel/trace/trace.c print_trace_line; trace-cmd's
#: trace-read.c show_data), and the header of a buffer that was written round (print_event_info).
LOST: Final = r"^CPU:([0-9]{1,5}) \[(?:LOST )?(?:([0-9]{1,18}) )?EVENTS(?: DROPPED)?\]"
WRITTEN: Final = r"^# entries-in-buffer/entries-written: ([0-9]{1,18})/([0-9]{1,18}) "

#: Columns that `parse` makes; the first five are text while it works.
_MADE: Final = ("vcpu", "stamp", "part", "event", "fields", "thread", "relative")
#: The rarer forms: which text, its pattern, what the groups are; the first group tells whether it is this one.
_FORMS: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("head", _LATENCY, ("vcpu", "stamp", "part", "us")),
    ("head", _THREAD, ("pid", "tid", "stamp", "part")),
    ("text", _WHOLE, ("vcpu", "stamp", "part", "event", "fields")),
    ("head", _UNTIMED, ("vcpu", "event")),
)


def parse(lines: pl.DataFrame) -> pl.DataFrame:
    """Split event lines at their fields.

    Args:
        lines: ``text`` and any other columns.

    Returns:
        The same rows and columns, and ``head`` (all before the first ``": "``), ``vcpu`` (UInt32, the CPU in brackets; null: not
        printed), ``stamp`` (UInt64; null: not printed), ``part`` (String, digits behind the point; null: none), ``relative`` (the
        stamp counts from the buffer's start), ``thread`` (UInt64, the thread where no CPU is printed), ``event`` (its name; null:
        the line is none of these forms) and ``fields`` (String, stripped on the left).
    """
    out = (
        lines.with_row_index("_row")
        .with_columns(pl.col("text").str.splitn(": ", 3).struct.rename_fields(["head", "_event", "_fields"]).alias("_parts"))
        .unnest("_parts")
        .with_columns(pl.col("head").str.extract_groups(_HEAD).struct.rename_fields(["vcpu", "stamp", "part"]).alias("_at"))
        .unnest("_at")
        .with_columns(
            relative=pl.lit(value=False),
            thread=pl.lit(None, pl.UInt64),
            event=pl.col("_event").map_batches(_named, pl.String),
            fields=pl.col("_fields").str.strip_chars_start(" "),
        )
    )
    odd = out["vcpu"].is_null() | out["event"].is_null()
    if odd.any():
        out = pl.concat([out.filter(~odd), _others(out.filter(odd))]).sort("_row")
    return out.drop("_row", "_event", "_fields").with_columns(
        pl.col("vcpu").cast(pl.UInt32, strict=False), pl.col("stamp").cast(pl.UInt64, strict=False)
    )


def _named(texts: pl.Series) -> pl.Series:
    """Return the name of the event that each text ends with."""
    return by_value(texts, lambda few: few.str.extract(_EVENT).to_frame()).to_series()


def _others(rows: pl.DataFrame) -> pl.DataFrame:
    """Read the rarer forms, each tried on what those before left."""
    left = rows.drop(_MADE)
    done = []
    for column, pattern, names in _FORMS:
        groups = left.select(pl.col(column).str.extract_groups(pattern).struct.rename_fields(names).alias("g")).unnest("g")
        absent = {name: pl.lit(None, pl.String) for name in (*_MADE[:5], "pid", "tid") if name not in names}
        got = pl.concat([left, groups], how="horizontal").with_columns(**absent)
        untimed = "stamp" not in names
        got = got.with_columns(
            event=pl.col("event") if "event" in names else pl.col("_event").str.extract(_EVENT),
            # Where there is no time, the first ": " is the one before the fields.
            fields=pl.concat_str("_event", pl.col("_fields"), separator=": ", ignore_nulls=True)
            if untimed
            else pl.coalesce("fields", pl.col("_fields").str.strip_chars_start(" ")),
            thread=pl.coalesce("tid", "pid").cast(pl.UInt64, strict=False),
            relative=pl.lit("us" in names) & pl.col("part").is_null(),
        )
        hit = got[names[0]].is_not_null() & got["event"].is_not_null()
        done.append(got.filter(hit).select(rows.columns))
        left = left.filter(~hit)
    nothing = (pl.lit(None, pl.Boolean if n == "relative" else pl.UInt64 if n == "thread" else pl.String).alias(n) for n in _MADE)
    done.append(left.with_columns(nothing).with_columns(relative=pl.lit(value=False)).select(rows.columns))
    return pl.concat(done)


def times(parsed: pl.DataFrame) -> pl.DataFrame:
    """Turn ``stamp``, ``part`` and ``relative`` of parsed lines into ``tsc`` (UInt64) and ``time_ns`` (Int64); drop them."""
    stamp, seconds = pl.col("stamp"), pl.col("part").is_not_null()
    ns = stamp.cast(pl.Int64, strict=False)
    part = pl.col("part").str.pad_end(9, "0").cast(pl.Int64, strict=False)
    small = stamp < 9 * 10**9
    return parsed.with_columns(
        tsc=pl.when(~seconds & ~pl.col("relative") & (stamp >= _LEAST_TSC)).then(stamp),
        time_ns=pl.when(seconds & small)
        .then(ns * 10**9 + part)
        .when(pl.col("relative") & pl.col("head").str.contains(r"us.?$") & (stamp < 9 * 10**15))
        .then(ns * 1000),
    ).drop("stamp", "part", "relative")


def losses(lines: pl.DataFrame) -> pl.DataFrame:
    """Return what the tracer says it dropped.

    Args:
        lines: ``text``, ``line``, ``offset``.

    Returns:
        ``line``, ``offset``, ``vcpu`` (UInt32; null: any), ``result`` (Int64, how many; null: it does not say), in order.
    """
    some = lines.filter(pl.col("text").str.starts_with("CPU:") | pl.col("text").str.starts_with("# entries-in-buffer"))
    gone = some.select("line", "offset", groups=pl.col("text").str.extract_groups(LOST)).unnest("groups").drop_nulls("1")
    over = some.select("line", "offset", groups=pl.col("text").str.extract_groups(WRITTEN)).unnest("groups").drop_nulls("1")
    return pl.concat(
        [
            gone.select("line", "offset", vcpu=pl.col("1").cast(pl.UInt32), result=pl.col("2").cast(pl.Int64)),
            over.select(
                "line",
                "offset",
                vcpu=pl.lit(None, pl.UInt32),
                result=pl.col("2").cast(pl.Int64) - pl.col("1").cast(pl.Int64),
            ).filter(pl.col("result") > 0),
        ]
    ).sort("line")
