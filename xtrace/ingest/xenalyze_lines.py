"""Records of ``xenalyze --dump-all`` text behind the time: which event each is, and what its fields say."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Final

import polars as pl

__all__ = ("REASONS", "SHAPE", "layout", "parse")

_DEFAULT_DOMAIN: Final = 32768  # xenalyze.c DEFAULT_DOMAIN
_NARROW: Final = (1 << 32) - 1  # the highest instruction pointer of a 32-bit record
_PREEMPTED: Final = 1 << 31
_LOST: Final = 0x1F001
_SUSPEND: Final = 2  # SHUTDOWN_suspend (xen/include/public/sched.h)
_COLUMNS: Final = r"^([-|.l 0-9]*)x[-|.l 0-9]* d(?:([0-9]{1,5})v([0-9]{1,5})|\?v\?)( +)(\S.*?)\s*$"
_CALL: Final = r"^hypercall +([0-9a-f]{1,5})(?: \(\S+\))?(?: (.*))?$"
_V1: Final = r"^hypercall +([0-9a-f]{1,8})(?: \(\S+\))? eip ([0-9a-f]{1,16})$"
_VMCALL: Final = r"^vmcall +([0-9a-f]{1,8})(?: \(\S+\))?$"
#: Exits of a hypercall: EXIT_REASON_VMCALL, VMEXIT_VMMCALL; their numbers where the tool has no name.
REASONS: Final = ("VMCALL", "VMEXIT_VMMCALL", "12", "81")
_EXIT: Final = rf"^vmexit exit_reason (?:{'|'.join(REASONS)}) eip ([0-9a-f]{{1,16}})"
_LOSS: Final = r"^lost_records count (-?[0-9]{1,10}) d([0-9]{1,5})v([0-9]{1,5}) \(cur "
_SHUTDOWN: Final = r"^(sched_shutdown|sched_shutdown_code) d([0-9]{1,10})v([0-9]{1,10}), reason = ([0-9]{1,10})$"
_GENERIC: Final = r"^([0-9a-f]{1,7})(\([0-9a-f]+:[0-9a-f]+:[0-9a-f]+\))(?: [0-9]{1,2} \[((?: [0-9a-f]{1,8}){0,7}) \])?$"
_WORDS: Final = tuple(f"w{i}" for i in range(7))


@cache
def layout() -> dict[str, Any]:
    """Return ``layouts/xenalyze.toml``."""
    with (Path(__file__).parent / "layouts" / "xenalyze.toml").open("rb") as file:
        return tomllib.load(file)


@cache
def _commands() -> pl.DataFrame:
    """Return the command names: ``op``, ``name``, ``number``."""
    rows = [(c["hypercall"], name, i) for c in layout()["command"] for i, name in enumerate(c["names"])]
    return pl.DataFrame(rows, schema={"op": pl.UInt32, "name": pl.String, "number": pl.UInt64}, orient="row")


def parse(tails: pl.Series) -> pl.DataFrame:
    """Read what stands behind the time, each distinct text once.

    Returns:
        ``tail``, ``action`` (null: not understood), ``kind`` (null: no event), and columns of ``schema.EVENTS``; ``eip`` of
        exits; ``next_domid``, ``next_vcpu`` of old scheduling records.
    """
    column = tails.to_frame("tail").with_columns(g=pl.col("tail").str.extract_groups(_COLUMNS)).unnest("g")
    body = pl.col("5")
    out = column.select(
        "tail",
        body.alias("body"),
        pcpu=pl.col("1").str.len_bytes(),
        gap=pl.col("4").str.len_bytes(),
        domid=pl.col("2").cast(pl.UInt32, strict=False),
        vcpu=pl.col("3").cast(pl.UInt32, strict=False),
    )
    nobody = (pl.col("domid") >= _DEFAULT_DOMAIN).fill_null(value=True)
    out = out.with_columns(domid=pl.when(~nobody).then("domid").cast(pl.UInt16), vcpu=pl.when(~nobody).then("vcpu"))
    body = pl.col("body")
    forms = (
        (body.str.starts_with("hypercall "), _calls),
        (body.str.starts_with("vmcall "), _vmcalls),
        (body.str.contains(r"^vm(?:exit|entry)\b"), _exits),
        (body.str.starts_with("lost_records "), _losses),
        (body.str.starts_with("sched_shutdown"), _shutdowns),
        (body.str.contains(r"^[0-9a-f]+\("), _generics),
    )
    chosen = ((out.filter(which), read) for which, read in forms)
    parts = [_shape(read(part)) for part, read in chosen if len(part)]
    return pl.concat([pl.DataFrame(schema=SHAPE), *parts])


SHAPE: Final = pl.Schema(
    {
        "tail": pl.String(),
        "action": pl.String(),
        "kind": pl.String(),
        "op": pl.UInt32(),
        "arg0": pl.UInt64(),
        "arg1": pl.UInt64(),
        "arg2": pl.UInt64(),
        "arg3": pl.UInt64(),
        "arg4": pl.UInt64(),
        "arg5": pl.UInt64(),
        "cut": pl.UInt8(),
        "rip": pl.UInt64(),
        "caller": pl.String(),
        "result": pl.Int64(),
        "pcpu": pl.UInt32(),
        "domid": pl.UInt16(),
        "vcpu": pl.UInt32(),
        "eip": pl.UInt64(),
        "mode": pl.String(),
        "next_domid": pl.UInt16(),
        "next_vcpu": pl.UInt32(),
    }
)


def _shape(part: pl.DataFrame) -> pl.DataFrame:
    have = set(part.columns)
    return part.select(
        (pl.col(name) if name in have else pl.lit(None)).cast(dtype, strict=False).alias(name) for name, dtype in SHAPE.items()
    )


def _hex(text: pl.Expr) -> pl.Expr:
    return text.str.to_integer(base=16, dtype=pl.UInt64, strict=False)


def _signed(text: pl.Expr) -> pl.Expr:
    """Read a number printed with ``%d`` as the 32 bits that it was."""
    value = text.cast(pl.Int64, strict=False)
    return pl.when(value.is_between(-(1 << 31), (1 << 32) - 1)).then(value & 0xFFFFFFFF).cast(pl.UInt64)


def _calls(part: pl.DataFrame) -> pl.DataFrame:
    """Read ``hypercall …``: V1 with an instruction pointer, V2 and sub-calls with decoded arguments."""
    body = pl.col("body")
    v1 = part.filter(body.str.contains(" eip ", literal=True)).with_columns(
        op=_hex(body.str.extract(_V1, 1)), rip=_hex(body.str.extract(_V1, 2))
    )
    known = pl.col("op").is_not_null() & pl.col("rip").is_not_null()
    v1 = v1.with_columns(
        action=pl.when(known).then(pl.lit("v1")),
        kind=pl.lit("hypercall"),
        caller=pl.when(pl.col("rip") > _NARROW).then(pl.lit("pv64")),
    )
    v2 = part.filter(~body.str.contains(" eip ", literal=True)).with_columns(
        op=_hex(body.str.extract(_CALL, 1)).cast(pl.UInt32), rest=body.str.extract(_CALL, 2).fill_null("")
    )
    op, rest = pl.col("op"), pl.col("rest")
    v2 = v2.with_columns(
        name=rest.str.extract(r"^(\S+?)(?: vcpu -?[0-9]+| -?[0-9]+ ops)?$", 1),
        odd=_signed(rest.str.extract(r"^unknown \((-?[0-9]{1,10})\)", 1)),
        count=_signed(rest.str.extract(r"(-?[0-9]{1,10})(?: (?:updates|calls|ops)(?: \(preempted\))?)?$", 1)),
    ).join(_commands(), on=["op", "name"], how="left", maintain_order="left")
    command = pl.coalesce("number", "odd")
    flag = pl.when(rest.str.ends_with(" updates (preempted)")).then(_PREEMPTED).otherwise(0).cast(pl.UInt64)
    second = op.is_in([1, 13, 24, 26])
    forms = (
        pl.when(op == 1).then(rest.str.contains(r"^[0-9]{1,10} updates(?: \(preempted\))?$"))
        .when(op == 13).then(rest.str.contains(r"^-?[0-9]{1,10} calls$"))
        .when(op == 20).then(rest.str.contains(r"^(?:\S+|unknown \(-?[0-9]+\)) -?[0-9]{1,10} ops$") & command.is_not_null())
        .when(op == 24).then(rest.str.contains(r"^(?:\S+|unknown \(-?[0-9]+\)) vcpu -?[0-9]{1,10}$") & command.is_not_null())
        .when(op == 26).then(rest.str.contains(r"^-?[0-9]{1,10} ops$"))
        .when(op == 29).then(command.is_not_null())
        .otherwise(rest.str.contains(r"^(?:(?:\?\?|[0-9a-f]{8}|[0-9]{16,20})(?: |$))*$"))
    )  # fmt: skip
    good = (op.is_not_null() & forms).fill_null(value=False) & pl.col("gap").is_in([1, 2])
    v2 = v2.with_columns(
        action=pl.when(good).then(pl.lit("v2")),
        kind=pl.when(pl.col("gap") == 2).then(pl.lit("subcall")).otherwise(pl.lit("hypercall")),
        arg0=pl.when(op.is_in([20, 24, 29])).then(command),
        arg1=pl.when(second).then(pl.col("count") | flag),
        arg2=pl.when(op == 20).then("count"),
        cut=pl.when(op == 20).then(5).when(op == 24).then(3).when(op == 29).then(1).when(second).then(2).otherwise(0),
    )
    return pl.concat([_shape(v1), _shape(_others(v2))])


def _others(v2: pl.DataFrame) -> pl.DataFrame:
    """Read arguments that the tool prints undecoded: ``??`` for one left out, 8 hex digits, or 16 and more decimal ones."""
    bare = ~pl.col("op").is_in([1, 13, 20, 24, 26, 29]) & (pl.col("rest") != "")
    if not v2.select(bare.any()).item():
        return v2
    words = pl.col("rest").str.split(" ")
    for i in range(6):
        word = words.list.get(i, null_on_oob=True)
        short = word.str.len_bytes() == 8
        value = pl.when(short).then(_hex(word)).when(word != "??").then(word.cast(pl.UInt64, strict=False))
        v2 = v2.with_columns(
            pl.when(bare).then(value).otherwise(f"arg{i}" if f"arg{i}" in v2.columns else None).alias(f"arg{i}"),
            cut=pl.col("cut") | pl.when(bare & short).then(1 << i).otherwise(0),
        )
    return v2


def _vmcalls(part: pl.DataFrame) -> pl.DataFrame:
    part = part.with_columns(op=_hex(pl.col("body").str.extract(_VMCALL, 1)), kind=pl.lit("vmmcall"))
    return part.with_columns(action=pl.when(pl.col("op").is_not_null()).then(pl.lit("vmcall")))


def _exits(part: pl.DataFrame) -> pl.DataFrame:
    """Read what comes before an HVM call; an exit for something else has no ``eip``."""
    exits = pl.col("body").str.starts_with("vmexit")
    return part.with_columns(
        action=pl.when(exits).then(pl.lit("exit")).otherwise(pl.lit("entry")), eip=_hex(pl.col("body").str.extract(_EXIT, 1))
    ).with_columns(mode=pl.when(pl.col("eip") > _NARROW).then(pl.lit("hvm64")))


def _losses(part: pl.DataFrame) -> pl.DataFrame:
    """Read ``lost_records``; the vCPU is the one that runs when records come again."""
    body = pl.col("body")
    part = part.with_columns(
        result=_signed(body.str.extract(_LOSS, 1)),
        domid=body.str.extract(_LOSS, 2).cast(pl.UInt32, strict=False),
        vcpu=body.str.extract(_LOSS, 3).cast(pl.UInt32, strict=False),
        kind=pl.lit("lost"),
        op=_LOST,
    )
    return part.with_columns(action=pl.when(pl.col("result").is_not_null()).then(pl.lit("lost")))


def _shutdowns(part: pl.DataFrame) -> pl.DataFrame:
    """Read the shutdown of a vCPU; only that for a suspend becomes an event."""
    body = pl.col("body")
    part = part.with_columns(
        domid=body.str.extract(_SHUTDOWN, 2).cast(pl.UInt16, strict=False),
        vcpu=body.str.extract(_SHUTDOWN, 3).cast(pl.UInt32, strict=False),
        op=pl.when(body.str.starts_with("sched_shutdown_code")).then(0x28010).otherwise(0x28007),
        reason=body.str.extract(_SHUTDOWN, 4).cast(pl.UInt32, strict=False),
    )
    return part.with_columns(
        action=pl.when(pl.col("reason").is_not_null()).then(pl.lit("shutdown")),
        kind=pl.when(pl.col("reason") == _SUSPEND).then(pl.lit("suspend")),
    )


def _generics(part: pl.DataFrame) -> pl.DataFrame:
    """Read records that the tool prints as bare words."""
    part = part.with_columns(g=pl.col("body").str.extract_groups(_GENERIC)).unnest("g")
    actions = {g["mark"]: g["action"] for g in layout()["generic"]}
    words = pl.col("3").str.strip_chars_start(" ").str.split(" ")
    part = part.with_columns(
        event=_hex(pl.col("1")),
        what=pl.col("2").replace_strict(actions, default=None, return_dtype=pl.String),
        n=pl.when(pl.col("3").fill_null("") != "").then(words.list.len()).otherwise(0),
        **{name: _hex(words.list.get(i, null_on_oob=True)) for i, name in enumerate(_WORDS)},
    )
    what, n, w = pl.col("what"), pl.col("n"), [pl.col(name) for name in _WORDS]
    v2 = what.is_in(["v2", "subcall"])
    bits = [w[0] // (1 << (20 + 2 * i)) & 3 for i in range(6)]
    # Arguments are read only where the number's upper bits and the count of words agree, as in the binary reader.
    agree = v2 & (1 + pl.sum_horizontal(bits) == n) & ~pl.any_horizontal(*(b == 3 for b in bits))
    arguments: dict[str, pl.Expr] = {}
    place: pl.Expr = pl.lit(1, pl.UInt64)
    cut: pl.Expr = pl.lit(0, pl.UInt64)
    table = pl.concat_list(_WORDS)
    for i, b in enumerate(bits):
        low, high = table.list.get(place, null_on_oob=True), table.list.get(place + 1, null_on_oob=True)
        arguments[f"arg{i}"] = pl.when(agree & (b == 1)).then(low).when(agree & (b == 2)).then(low + high * (1 << 32))
        cut = cut | pl.when(agree & (b == 1)).then(1 << i).otherwise(0)
        place = place + b
    two = n >= 2  # an HVM call with a word too many: dom | vcpu << 16, eax (to 3.3) or eax, 0 (3.4.0 to 4.0.1)
    old = two & (w[1] != 0)
    op = (
        pl.when(what == "v1_32").then(w[1]).when(what == "v1_64").then(w[2])
        .when(v2 & (agree | (n > 1))).then(w[0] & 0xFFFFF).when(v2).then(w[0])
        .when(what == "vmmcall").then(pl.when(old).then(w[1]).otherwise(w[0]))
        .when(what == "shutdown").then("event")
    )  # fmt: skip
    needs = {"v1_32": 2, "v1_64": 3, "v2": 1, "subcall": 1, "vmmcall": 1, "switch": 4, "shutdown": 3}
    # An exit that is not for a hypercall, or whose words were left out, only ends what the one before it said. Words of an exit:
    # reason, rip; to 3.3 dom | vcpu << 16 before them; from 3.4.0 to 4.0.1 a 0 behind.
    wide = what == "exit64"
    dommed = pl.when(wide).then((n == 4) & (w[3] != 0)).otherwise(n == 4)
    reason = pl.when(dommed).then(w[1]).otherwise(w[0])
    lower = pl.when(dommed).then(w[2]).otherwise(w[1])
    upper = pl.when(dommed).then(w[3]).when(wide).then(w[2]).otherwise(0)
    called = what.is_in(["exit32", "exit64"]) & (n >= 2 + wide.cast(pl.UInt32)) & reason.is_in([0x12, 0x81])
    mode = pl.when(called & wide & ~dommed).then(pl.lit("hvm64")).when(called & ~wide & ~dommed).then(pl.lit("hvm32"))
    ends = what.is_in(["exit32", "exit64", "exit_other"])
    enough = n >= what.replace_strict(needs, default=0, return_dtype=pl.UInt32)
    down, dom = what == "shutdown", (what == "vmmcall") & old
    kinds = {"v1_32": "hypercall", "v1_64": "hypercall", "v2": "hypercall", "subcall": "subcall", "vmmcall": "vmmcall"}
    return part.with_columns(
        action=pl.when(enough).then(pl.when(ends).then(pl.lit("exit")).otherwise(what)),
        eip=pl.when(called).then(lower + upper * (1 << 32)),
        mode=mode,
        kind=pl.when(down & (w[2] == _SUSPEND)).then(pl.lit("suspend"))
        .otherwise(what.replace_strict(kinds, default=None, return_dtype=pl.String)),
        op=op,
        cut=cut,
        rip=pl.when(what == "v1_32").then(w[0]).when(what == "v1_64").then(w[0] + w[1] * (1 << 32)),
        caller=pl.when(what == "v1_32").then(pl.lit("pv32")).when(what == "v1_64").then(pl.lit("pv64")),
        domid=pl.when(down).then(w[0] & 0xFFFF).when(dom).then(w[0] & 0xFFFF).otherwise("domid"),
        vcpu=pl.when(down).then(w[1] & 0xFFFF).when(dom).then(w[0] // (1 << 16)).otherwise("vcpu"),
        next_domid=pl.when(what == "switch").then(w[2] & 0xFFFF),
        next_vcpu=pl.when(what == "switch").then(w[3] & 0xFFFF),
        **arguments,
    )  # fmt: skip
