# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.modules import iommufd_info
from ansible_collections.virt.iommufd.plugins.plugin_utils import _report_text
from ansible_collections.virt.iommufd.plugins.plugin_utils._audit_words import HOST_VERDICTS, NOT_LIMITED
from ansible_collections.virt.iommufd.plugins.plugin_utils._forecast import memlock_forecast
from ansible_collections.virt.iommufd.plugins.plugin_utils._report import audit_report
from ansible_collections.virt.iommufd.tests.bench import fleet
from ansible_collections.virt.iommufd.tests.unit import fit_rows
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from ansible_collections.virt.iommufd.tests.unit.fit_rows import GIB, by_qemu, defined, idle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MIB = 1024**2
PINNED = 65792 * 1024

Row = dict[str, Any]

NATIVE = {"sets_rlimit_mode": True, "cap_sys_resource": True}


def process(**fields: Any) -> Row:
    """A running VM, as the module returns it; of its fields, those that matter here."""
    counter = {"user": "user", "process": "mm_locked"}.get(fields.get("accounting", "user"))
    counter = fields.get("counter", counter)
    return {
        "pid": 4242,
        "comm": "qemu-system-x86",
        "uid": 64055,
        "user": "libvirt-qemu",
        "name": "guest1",
        "domain": "vm1",
        "domain_uri": "qemu:///system",
        "unit": "machine-qemu\\x2d1\\x2dvm1.scope",
        "user_unit": None,
        "initial_user_namespace": True,
        "memory_bytes": 64 * MIB,
        "memory_pluggable": False,
        "of_devices_bytes": 0,
        "locks_memory": False,
        "backends": ["iommufd"],
        "iommufds": [{"rlimit_mode": "user", "settable": False}],
        "vfio_devices": [{"as_it_runs": False}],
        "address_spaces": 1,
        "holder": False,
        "pinned_bytes": PINNED,
        "locked_bytes": 0,
        "memlock_bytes": 100 * MIB,
        "memlock_unlimited": False,
        "accounting": "user",
        "counter": counter,
        "counters": [{"counter": counter}] if counter else [],
        "headroom_bytes": 100 * MIB - PINNED,
        "notes": [],
        **fields,
    }


def unlimited(**fields: Any) -> Row:
    """A running VM without a limit."""
    return process(memlock_bytes=None, memlock_unlimited=True, headroom_bytes=None, **fields)


def info(*processes: Row, at_risk: bool | None = False, **host: Any) -> Row:
    """What the module returned on a host."""
    return {
        "host": {"limits_of_view": [], "module": "loaded", "libvirt": NATIVE, **host},
        "processes": list(processes),
        "users": [
            {"uid": uid, "at_risk": risk, "uncertain_bytes": 0} for uid, risk in ((64055, at_risk), (1000, False))
        ],
    }


def unseen(*what: str) -> list[Row]:
    return [{"what": each, "why": "Run the task as root."} for each in what]


def told(result: Any) -> Row:
    """What the data tells of one host."""
    row: Row = audit_report({"kvm1": result})["hosts"]["kvm1"]
    return row


def test_the_documented_fields() -> None:
    fields = documented_fields("audit_report")
    row = told(info(process(), at_risk=True))
    assert row.keys() == fields["hosts"]["contains"].keys() - {"forecast"}
    contents = fields["hosts"]["contains"]
    assert row["vms"] == [{name: field["sample"] for name, field in contents["vms"]["contains"].items()}]
    (holder,) = told(info(process(), process(holder=True, **launcher())))["holders"]
    assert holder == {name: field["sample"] for name, field in contents["holders"]["contains"].items()}
    report = audit_report({"kvm1": info(process(), at_risk=True)})
    assert report.keys() == fields.keys()
    assert report["lines"] == fields["lines"]["sample"]
    assert report["end"] == fields["end"]["sample"]
    assert report["lines"][-len(report["end"]) :] == report["end"]


def launcher() -> Row:
    """What tells a launcher from a VM."""
    return {"pid": 812, "comm": "launcher", "uid": 0, "user": "root", "domain": None, "name": None, "unit": None}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, "vm1", id="domain"),
        pytest.param({"domain": None}, "guest1", id="name"),
        pytest.param({"domain": None, "name": None}, "machine-qemu\\x2d1\\x2dvm1.scope", id="unit"),
        pytest.param({"domain": None, "name": None, "unit": None}, "qemu-system-x86 (4242)", id="process"),
        pytest.param({"domain": None, "name": ""}, "machine-qemu\\x2d1\\x2dvm1.scope", id="empty name"),
    ],
)
def test_what_a_vm_is_called(fields: Row, expected: str) -> None:
    assert told(info(process(**fields)))["vms"][0]["vm"] == expected


def test_a_user_without_a_name() -> None:
    assert told(info(process(user=None)))["vms"][0]["user"] == "64055"


@pytest.mark.parametrize(
    ("vm", "at_risk", "expected"),
    [
        pytest.param(process(), False, "ok", id="per user"),
        pytest.param(process(), True, "at risk", id="per user, and no other fits"),
        pytest.param(process(), None, "unknown", id="per user, and another one might not fit"),
        pytest.param(process(accounting="process"), None, "ok", id="per process, and it does not matter"),
        pytest.param(process(headroom_bytes=-4096), None, "over limit", id="over limit, whatever else there is"),
        pytest.param(process(uid=1000), True, "ok", id="it is another user who is at risk"),
        pytest.param(process(accounting="process"), True, "ok", id="per process"),
        pytest.param(process(headroom_bytes=0), False, "ok", id="nothing left"),
        pytest.param(process(headroom_bytes=-4096), True, "over limit", id="over limit"),
        pytest.param(process(accounting="process", headroom_bytes=-1), False, "over limit", id="over its own limit"),
        pytest.param(process(accounting="none", headroom_bytes=None), True, "not limited", id="not accounted"),
        pytest.param(unlimited(), True, "not limited", id="unlimited"),
        pytest.param(process(accounting=None, headroom_bytes=None), True, "unknown", id="unknown"),
    ],
)
def test_the_verdict_on_a_vm(vm: Row, at_risk: bool | None, expected: str) -> None:
    row = told(info(vm, at_risk=at_risk))
    assert (row["vms"][0]["verdict"], row["verdict"]) == (expected, expected)


def test_without_users_nobody_is_known_to_be_at_risk() -> None:
    result = info(process(), at_risk=True)
    del result["users"]
    assert told(result)["verdict"] == "ok"


OVER, FINE, FREE = process(headroom_bytes=-1, domain="vm3"), process(accounting="process"), unlimited()
UNKNOWN = process(accounting=None, domain="vm4")


@pytest.mark.parametrize(
    ("result", "status", "verdict", "summary"),
    [
        pytest.param(info(FINE), "ok", "ok", "1 VM, 1 ok", id="one VM"),
        pytest.param(info(FREE, FREE), "ok", "not limited", "2 VMs, 2 not limited", id="two VMs"),
        pytest.param(info(FREE, FINE), "ok", "ok", "2 VMs, 1 ok; 1 not limited", id="different VMs"),
        pytest.param(
            info(FREE, UNKNOWN, FINE), "ok", "unknown", "3 VMs, 1 unknown: vm4; 1 ok; 1 not limited", id="an unknown VM"
        ),
        pytest.param(
            info(process(), process(domain="vm2"), OVER, UNKNOWN, at_risk=True),
            "ok",
            "over limit",
            "4 VMs, 1 over limit: vm3; 2 at risk: vm1, vm2; 1 unknown: vm4",
            id="the worst comes first",
        ),
        pytest.param(
            info(FINE, limits_of_view=unseen("descriptors")),
            "ok",
            "ok",
            "1 VM, 1 ok; there may be more",
            id="hidden VMs",
        ),
        pytest.param(info(FINE, limits_of_view=unseen("libvirt")), "ok", "ok", "1 VM, 1 ok", id="hidden details"),
        pytest.param(info(FINE, module="absent"), "ok", "ok", "1 VM, 1 ok", id="a VM of a kernel without iommufd"),
        pytest.param(info(), "ok", "no VMs", "no VMs", id="no VMs"),
        *(
            pytest.param(
                info(limits_of_view=unseen(what)),
                "ok",
                "unknown",
                "no VMs seen, but not all processes could be looked at",
                id=f"no VMs seen, {what}",
            )
            for what in ("processes", "descriptors", "iommufds")
        ),
        pytest.param(info(limits_of_view=unseen("libvirt", "users")), "ok", "no VMs", "no VMs", id="other limits"),
        pytest.param(info(module="absent"), "no_iommufd", "no iommufd", "no iommufd in this kernel", id="no iommufd"),
        pytest.param(info(module="loadable"), "no_iommufd", "no iommufd", "iommufd is not loaded", id="not loaded"),
        pytest.param(
            info(module=None), "ok", "unknown", "no VMs; whether the kernel has iommufd is unknown", id="unknown kernel"
        ),
        pytest.param(
            {"host": {"limits_of_view": []}, "processes": [], "users": []},
            "ok",
            "no VMs",
            "no VMs",
            id="no subset host",
        ),
    ],
)
def test_the_verdict_on_a_host(result: Row, status: str, verdict: str, summary: str) -> None:
    row = told(result)
    assert (row["status"], row["verdict"], row["summary"], row["msg"]) == (status, verdict, summary, "")
    assert row["limits_of_view"] == result["host"]["limits_of_view"]


@pytest.mark.parametrize(
    ("result", "status", "msg"),
    [
        pytest.param({"unreachable": True, "msg": "No route"}, "unreachable", "No route", id="unreachable"),
        pytest.param({"failed": True, "msg": "No ctypes"}, "failed", "No ctypes", id="failed"),
        pytest.param({"failed": True}, "failed", "", id="failed without a message"),
        pytest.param({"failed": True, "msg": ["a", "b"]}, "failed", "['a', 'b']", id="failed with another message"),
        pytest.param({"skipped": True}, "failed", "The task was skipped on this host.", id="skipped"),
        pytest.param(None, "failed", "There is no result of this host.", id="nothing"),
        pytest.param("text", "failed", "There is no result of this host.", id="text"),
        pytest.param(
            {"host": {"limits_of_view": []}},
            "failed",
            "The result lacks processes: run virt.iommufd.iommufd_info with that subset.",
            id="without processes",
        ),
        pytest.param(
            {"host": {"limits_of_view": []}, "processes": [{}]},
            "failed",
            "The result is not what this version of virt.iommufd.iommufd_info returns (KeyError('counters')).",
            id="without fields",
        ),
    ],
)
def test_a_host_that_could_not_be_looked_at(result: Any, status: str, msg: str) -> None:
    assert told(result) == {
        "status": status,
        "msg": msg,
        "limits_of_view": [],
        "not_ready": [],
        "vms": [],
        "holders": [],
        "verdict": status,
        "summary": f"{status}: {msg}" if msg else status,
    }


def test_the_text() -> None:
    results = {
        "kvm1": info(
            process(),
            process(domain="vm2", headroom_bytes=100 * MIB - 2 * PINNED),
            process(domain=None, name="free", uid=0, user="root", accounting="none", headroom_bytes=None),
            at_risk=True,
        ),
        "kvm2": info(
            unlimited(domain="large", accounting="process", pinned_bytes=66 * 1024 * MIB),
            process(accounting=None, headroom_bytes=None, iommufds=None, notes=["Its iommufds cannot be looked at."]),
            limits_of_view=unseen("descriptors"),
        ),
        "kvm3": info(),
        "kvm4": info(module="absent"),
        "kvm5": {"failed": True, "msg": "The\nfirst \t line"},
        "kvm6": {
            "unreachable": True,
            "msg": "Failed to connect to the host via ssh: ssh: connect to host kvm6 port 22:",
        },
    }
    assert (
        "\n".join(audit_report(results)["lines"])
        == """\
kvm1
VM    user        backend  counter  pinned  limit  headroom  verdict
vm1   libvirt...  iommufd  user      64.2M   100M     35.8M  at risk
vm2   libvirt...  iommufd  user      64.2M   100M    -28.5M  over limit
free  root        iommufd  none      64.2M   100M         -  not limited
vm1: At its next start have libvirt set the rlimit mode: name iommufd by
<driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
<qemu:commandline>.
vm2: At its next start have libvirt set the rlimit mode: name iommufd by
<driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
<qemu:commandline>; until then, prlimit raises its limit at once.

kvm2
VM     backend  counter  pinned  limit  headroom  verdict
large  iommufd  VmLck       66G   none         -  not limited
vm1    iommufd  ?         64.2M   100M         -  unknown
All of user libvirt-qemu.
vm1: To know, audit as root on the host itself, with
kernel.yama.ptrace_scope below 3: limits_of_view has what was not seen.
vm1: Its iommufds cannot be looked at.
Not all seen (descriptors): Run the task as root.

kvm3
no VMs

kvm4
no iommufd in this kernel

kvm5
failed: The first line

kvm6
unreachable: Failed to connect to the host via ssh: ssh: connect to host
kvm6 port 22:

6 hosts with 5 VMs: 1 over limit, 1 unknown, 1 failed, 1 unreachable, 1
no iommufd, 1 no VMs
kvm1: 3 VMs, 1 over limit: vm2; 1 at risk: vm1; 1 not limited
kvm2: 2 VMs, 1 unknown: vm1; 1 not limited; there may be more
kvm5: failed: The first line
kvm6: unreachable: Failed to connect to the host via ssh: ssh: connec...
kvm4: no iommufd in this kernel
kvm3: no VMs
1 VM: At its next start have libvirt set the rlimit mode: name iommufd
by <driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
<qemu:commandline>.
1 VM: At its next start have libvirt set the rlimit mode: name iommufd
by <driver name='vfio' iommufd='yes'/> in its <hostdev>, and not in
<qemu:commandline>; until then, prlimit raises its limit at once.
1 VM: To know, audit as root on the host itself, with
kernel.yama.ptrace_scope below 3: limits_of_view has what was not seen."""
    )


LONG = "a-name-that-is-far-too-long-for-any-column-of-a-table-and-for-a-line-of-text-too-in-fact"


@pytest.mark.parametrize(
    ("vm", "user", "expected"),
    [
        pytest.param("vm1", LONG, "vm1  a-name-that-...  iommufd  user      64.2M   100M     35.8M  ok", id="user"),
        pytest.param(LONG, "vm", "a-name-that...  vm    iommufd  user      64.2M   100M     35.8M  ok", id="VM"),
        pytest.param(LONG, LONG, "a-name...  a-name...  iommufd  user      64.2M   100M     35.8M  ok", id="both"),
    ],
)
def test_names_make_room(vm: str, user: str, expected: str) -> None:
    lines = audit_report({"kvm1": info(process(domain=vm, user=user), process(user="root"))})["lines"]
    assert lines[2] == expected


def test_one_user_of_all_makes_room() -> None:
    lines = audit_report({"kvm1": info(process(domain=LONG, user=LONG))})["lines"]
    assert lines[1:4] == [
        "VM                    backend  counter  pinned  limit  headroom  verdict",
        f"{LONG[:17]}...  iommufd  user      64.2M   100M     35.8M  ok",
        f"All of user {LONG[:57]}...",
    ]


def test_a_host_has_one_line_at_the_end() -> None:
    end = audit_report({LONG: info(OVER, process())})["end"]
    assert end[:2] == [
        "1 host with 2 VMs: 1 over limit",
        "a-name-that-is-far-too-long-for-any-c...: 2 VMs, 1 over limit: vm3; 1 ok",
    ]


def test_a_long_name_and_a_long_summary() -> None:
    end = audit_report({LONG: {"failed": True, "msg": "b" * 99}})["end"]
    assert end == ["1 host with 0 VMs: 1 failed", f"{LONG[:33]}...: failed: {'b' * 23}..."]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("a\x1b[2Jb", "a\\x1b[2Jb", id="escape sequence"),
        pytest.param("a\nb\tc\rd  e\u2028f", "a b c d e f", id="space"),
        pytest.param("gr\xf6\xdfe", "gr\\xf6\\xdfe", id="letters"),
        pytest.param("\u4ed6\u202eba", "\\u4ed6\\u202eba", id="wide, and from right to left"),
        pytest.param("\U0001f40d\x7f", "\\U0001f40d\\x7f", id="beyond"),
        pytest.param("a\\x2db", "a\\x2db", id="what is escaped already"),
    ],
)
def test_text_moves_no_cursor(name: str, shown: str) -> None:
    report = audit_report({name: info(OVER, process(domain=name, headroom_bytes=-1, notes=[name]))})
    lines = report["lines"]
    assert lines[0] == shown
    assert lines[3].startswith(shown)
    assert f"{shown}: {shown}" in lines
    assert report["end"][1] == f"{shown}: 2 VMs, 2 over limit: vm3, {shown}"
    assert list(report["hosts"]) == [name]
    assert report["hosts"][name]["vms"][1]["vm"] == name


def forecasting(rows: Any, **fields: Any) -> Row:
    """What the module returned on a host where nothing runs, with these VMs defined."""
    return idle(**{"host": fit_rows.native(), "defined": rows, **fields})


# Both are charged to their user, and one has no room even by itself.
FITS, FAILS = (
    defined(name=name, devices=[by_qemu()], hard_limit_bytes=size * GIB) for name, size in (("fits", 70), ("fails", 40))
)


def test_the_text_of_a_forecast() -> None:
    off = defined(name="off", autostart=False)
    report = audit_report({"kvm1": forecasting([FITS, FAILS, off]), "kvm2": forecasting([off])}, forecast=True)
    assert report["lines"] == [
        "kvm1",
        "no VMs",
        "Of the VMs that are defined, would each start now, and after a reboot?",
        "VM     now  reboot  counter  charged  needed  limit",
        "fits   yes  yes     user           0     65G    70G",
        "fails  no   no      user           0     65G    40G",
        "off    yes  -       VmLck          0     65G    65G",
        *report["lines"][7:11],
        "1 of 2 VMs would not come back after a reboot",
        "",
        "kvm2",
        "no VMs",
        "Of the VMs that are defined, would each start now, and after a reboot?",
        "VM   now  reboot  counter  charged  needed  limit",
        "off  yes  -       VmLck          0     65G    65G",
        "No VM starts at boot",
        "",
        *report["end"],
    ]
    assert "fails: To make it fit: raise its limit" in report["lines"][7]
    assert report["end"] == [
        "2 hosts with 0 VMs: 2 no VMs",
        "kvm1: no VMs",
        "kvm2: no VMs",
        "1 of 2 VMs would not come back after a reboot",
        "kvm1: 1 of 2 VMs would not come back after a reboot",
    ]


def test_the_data_of_a_forecast() -> None:
    contents = documented_fields("audit_report")["hosts"]["contains"]
    row = audit_report({"kvm1": forecasting([FITS, FAILS])}, forecast=True)["hosts"]["kvm1"]
    forecast = row["forecast"]
    assert row.keys() == contents.keys()
    assert forecast.keys() == contents["forecast"]["contains"].keys()
    assert (forecast["msg"], forecast["trouble"]) == ("", True)
    answer = memlock_forecast(forecasting([FITS, FAILS]))
    assert (forecast["now"], forecast["reboot"]) == (answer["now"], answer["reboot"])
    other = dict.fromkeys(("moved", "grown", "live_update"))
    assert [{**vm, **other} for vm in forecast["vms"]] == answer["vms"]
    assert json.loads(json.dumps(row)) == row


def test_what_would_not_start_now_is_told_where_all_come_back() -> None:
    row = forecasting([{**FAILS, "autostart": False}])
    assert audit_report({"kvm1": row}, forecast=True)["end"] == [
        "1 host with 0 VMs: 1 no VMs",
        "kvm1: no VMs",
        "0 of 0 VMs would not come back after a reboot",
        "kvm1: 1 of 1 VM would not start now",
    ]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        pytest.param(info(process()), "what would start is not known: The input ", id="of another version"),
        pytest.param(idle(), "what would start is not known: The input lacks defined: run ", id="not asked"),
        pytest.param(forecasting([3]), "what would start is not known: defined[0]: a int is no VM", id="nonsense"),
        pytest.param(
            forecasting([], host=fit_rows.host(limits_of_view=unseen("defined"))),
            "No VM starts at boot; there may be more",
            id="without privilege",
        ),
        pytest.param(
            forecasting([FITS], host=fit_rows.host(limits_of_view=unseen("processes"))),
            "0 to 1 of 1 VM would not start now; there may be more",
            id="hidden processes",
        ),
    ],
)
def test_a_host_of_which_no_forecast_is_known(result: Row, expected: str) -> None:
    report = audit_report({"kvm1": result, "kvm2": {"failed": True, "msg": "No."}}, forecast=True)
    assert report["hosts"]["kvm1"]["forecast"]["summary"].startswith(expected)
    assert report["hosts"]["kvm1"]["forecast"]["trouble"]
    assert expected in " ".join(report["lines"])
    assert [line for line in report["end"] if line.startswith(f"kvm1: {expected[:20]}")]
    # Of one that gave no answer at all, its own line says so.
    assert report["hosts"]["kvm2"]["forecast"]["msg"] == "No."
    assert [line for line in report["end"] if line.startswith("kvm2")] == ["kvm2: failed: No."]
    # What it has told beside that stands.
    plain = audit_report({"kvm1": result})["hosts"]["kvm1"]
    assert {**report["hosts"]["kvm1"], "forecast": None} == {**plain, "forecast": None}


def test_without_a_forecast_nothing_is_told_of_it() -> None:
    result = forecasting([FITS, FAILS])
    without = {name: value for name, value in result.items() if name != "defined"}
    assert audit_report({"kvm1": result}) == audit_report({"kvm1": without})
    assert "forecast" not in audit_report({"kvm1": result})["hosts"]["kvm1"]


def test_the_end_of_a_thousand_forecasts_fits_a_screen() -> None:
    results = fleet.fleet(1000, 8, 20)
    before = time.process_time()
    report = audit_report(results, forecast=True)
    # It takes 6 s here.
    assert time.process_time() - before < 30
    assert sum(host["forecast"]["reboot"] is not None for host in report["hosts"].values()) == 980
    assert len(report["end"]) == _report_text.SCREEN
    (number,) = [
        number for number, line in enumerate(report["end"]) if "would not come back" in line and ": " not in line
    ]
    assert " ".join(report["end"][number : number + 2]).endswith("after a reboot; not known of 20 hosts")
    # The worst, though it is not the first.
    assert report["end"][number + 2] == "kvm0006: 13 of 20 VMs would not come back after a reboot"
    assert [line for line in report["end"] if line.startswith("... and ")][1] == "... and 977 hosts more"


# Of what a process has, and of what is within that.
NAMES = [*process(), "rlimit_mode", "settable", "as_it_runs"]
DEFINED_NAMES = [*defined()]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(NAMES), inner),
    max_leaves=8,
)


DEFINED = st.dictionaries(st.sampled_from(DEFINED_NAMES), JUNK, max_size=3)
HOST = st.dictionaries(st.sampled_from(["readiness", "libvirt", "module", "limits_of_view"]), JUNK, max_size=2)


# A busy machine is no reason to fail.
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(),
        st.builds(
            lambda fields, host, users: {**info(process(), {**process(), **fields}), **host, **users},
            st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=3),
            st.dictionaries(
                st.just("host"), JUNK | st.builds(lambda given: {**info()["host"], **given}, HOST), max_size=1
            ),
            st.dictionaries(st.just("users"), JUNK, max_size=1),
        )
        | st.builds(forecasting, st.lists(JUNK | st.builds(lambda given: {**defined(), **given}, DEFINED), max_size=3))
        | JUNK,
        max_size=3,
    ),
    st.booleans(),
)
def test_whatever_a_host_returns(results: Row, forecast: bool) -> None:
    report = audit_report(results, forecast)
    assert report["hosts"].keys() == results.keys()
    assert len(report["end"]) <= _report_text.SCREEN
    for line in report["lines"]:
        assert len(line) <= _report_text.WIDTH
        assert line.isascii()
        assert line == "" or line.isprintable()


def test_the_data_can_be_written_as_json() -> None:
    report = audit_report({"kvm1": info(process(), unlimited()), "kvm2": None})
    assert json.loads(json.dumps(report)) == report


def test_no_hosts() -> None:
    assert audit_report({}) == {"hosts": {}, "lines": [], "end": []}


@pytest.mark.parametrize("field", ["counter", "counters", "backends", "holder", "domain_uri"])
def test_an_answer_of_another_version(field: str) -> None:
    """What it does not tell is not guessed."""
    old = {name: value for name, value in process().items() if name != field}
    row = told(info(old, at_risk=True))
    assert row["status"] == "failed"
    assert row["msg"] == (
        f"The result is not what this version of virt.iommufd.iommufd_info returns (KeyError('{field}'))."
    )


def test_what_may_come_later() -> None:
    """The memory of a VM with an mdev counts as it runs: for the VM alone, or for its user, and so for all of them."""
    mdev = [{"as_it_runs": True}]
    later = process(domain="vgpu", vfio_devices=mdev)
    alone = process(accounting="process", domain="alone", vfio_devices=mdev, memory_bytes=512 * MIB)
    row = told(info(process(), later, alone, at_risk=None))
    assert [vm["verdict"] for vm in row["vms"]] == ["may fail later"] * 3
    assert row["verdict"] == "may fail later"
    assert row["summary"] == "3 VMs, 3 may fail later: vm1, vgpu, alone"
    assert row["vms"][0]["remedy"].startswith(
        "It fits now, and may fail later, since a VM of its user may pin more as it runs, as with an mdev: at its next"
    )
    # One that is charged for itself takes nothing from the user.
    row = told(info(process(), alone))
    assert [vm["verdict"] for vm in row["vms"]] == ["ok", "may fail later"]
    lines = audit_report({"kvm1": info(alone)})["lines"]
    assert lines[2] == "alone  iommufd  VmLck     64.2M   100M     35.8M  may fail later"


def test_other_backends() -> None:
    """The memory of one with the legacy container stands in VmLck, which VmPin knows nothing of."""
    lines = audit_report(
        {
            "kvm1": info(
                process(domain="legacy", **legacy()),
                process(domain="both", **legacy(backends=["iommufd", "legacy"])),
                process(domain="vdpa", accounting="process", counter="mm_pinned", backends=["vdpa"]),
                process(domain="unseen", accounting=None, backends=None, headroom_bytes=None),
            )
        }
    )["lines"]
    assert lines[2:6] == [
        "legacy  legacy     VmLck     64.2M   100M     35.8M  ok",
        "both    iomm+lega  VmLck     64.2M   100M     35.8M  ok",
        "vdpa    vdpa       VmPin     64.2M   100M     35.8M  ok",
        "unseen  ?          ?         64.2M   100M         -  unknown",
    ]


def legacy(**fields: Any) -> Row:
    """What a VM has that uses VFIO's legacy container alone."""
    given = {"accounting": "process", "pinned_bytes": 0, "locked_bytes": PINNED, "iommufds": []}
    return {**given, "backends": ["legacy"], **fields}


def test_a_holder_is_no_vm() -> None:
    # On its command line, it may have the guest that it starts.
    row = told(info(process(), process(holder=True, headroom_bytes=-1, **{**launcher(), "name": "vm1"})))
    assert [vm["vm"] for vm in row["vms"]] == ["vm1"]
    assert [holder["name"] for holder in row["holders"]] == ["launcher (812)"]
    assert row["summary"] == "1 VM, 1 ok"
    lines = audit_report({"kvm1": info(process(holder=True, **launcher()))})["lines"]
    assert lines[:4] == [
        "kvm1",
        "no VMs",
        "No VM, but a holder: launcher (812) of user root has copies of what",
        "another process uses, and has pinned nothing.",
    ]


LACKS = [
    {"what": "module", "ready": True, "msg": ""},
    {"what": "iommu", "ready": False, "msg": "The IOMMU is off: boot with intel_iommu=on."},
    {"what": "bound", "ready": None, "msg": "/sys cannot be read."},
]


@pytest.mark.parametrize(
    ("result", "verdict", "summary"),
    [
        pytest.param(info(readiness=LACKS), "not ready", "no VMs; not ready: iommu", id="no VMs"),
        pytest.param(info(FINE, readiness=LACKS), "ok", "1 VM, 1 ok; not ready: iommu", id="a VM"),
        pytest.param(info(readiness=LACKS[2:]), "no VMs", "no VMs", id="unknown"),
        pytest.param(
            info(readiness=LACKS, module="absent"), "no iommufd", "no iommufd in this kernel", id="no iommufd"
        ),
        pytest.param(
            info(readiness=LACKS, limits_of_view=unseen("processes")),
            "unknown",
            "no VMs seen, but not all processes could be looked at; not ready: iommu",
            id="VMs that may be there",
        ),
    ],
)
def test_a_host_that_is_not_ready(result: Row, verdict: str, summary: str) -> None:
    report = audit_report({"kvm1": result})
    row = report["hosts"]["kvm1"]
    assert (row["verdict"], row["summary"], row["status"]) == (
        verdict,
        summary,
        "no_iommufd" if verdict == "no iommufd" else "ok",
    )
    assert [each["what"] for each in row["not_ready"]] == [
        each["what"] for each in result["host"]["readiness"] if each["what"] in ("iommu", "bound")
    ]
    text = "\n".join(report["lines"])
    assert "Unknown whether ready (bound): /sys cannot be read.\n" in text
    assert ("Not ready (iommu): The IOMMU is off: boot with intel_iommu=on.\n" in text) == (verdict != "no VMs")


def test_sentences_are_told_once() -> None:
    """Below the table with the VMs that each is true of, and at the end with how many these are."""
    vms = [process(domain=f"vm{number}", notes=["It is so."]) for number in range(3)]
    report = audit_report({"kvm1": info(*vms, at_risk=True)})
    text = " ".join(report["lines"])
    assert text.count("vm0, vm1, vm2: At its next start have libvirt set the rlimit mode: ") == 1
    assert text.count("vm0, vm1, vm2: It is so.") == 1
    assert text.count("3 VMs: At its next start have libvirt set the rlimit mode: ") == 1


def test_the_worst_hosts_come_first() -> None:
    """Those that are alike stay in the order of the inventory."""
    results = {
        "fine": info(FINE),
        "risk1": info(process(), at_risk=True),
        "none": info(module="absent"),
        "over": info(OVER),
        "gone": {"unreachable": True},
        "risk2": info(process(), at_risk=True),
        "free": info(FREE),
        "empty": info(),
        "broken": {"failed": True},
        "bare": info(readiness=LACKS),
        "what": info(UNKNOWN),
    }
    end = audit_report(results)["end"]
    named = [line.partition(":")[0] for line in end if line.partition(":")[0] in results]
    assert named == ["over", "risk1", "risk2", "what", "broken", "gone", "bare", "none", "fine", "free", "empty"]
    assert end[:2] == [
        "11 hosts with 6 VMs: 1 over limit, 2 at risk, 1 unknown, 1 failed, 1",
        "unreachable, 1 not ready, 1 no iommufd, 1 ok, 1 not limited, 1 no VMs",
    ]


def test_a_made_up_host_tells_all_that_the_module_does() -> None:
    """And has VMs of all kinds, and a launcher."""
    returned = yaml.safe_load(iommufd_info.RETURN)
    results = fleet.fleet(100, 8)
    processes = [each for result in results.values() for each in result.get("processes", [])]
    assert all(each.keys() == returned["processes"]["contains"].keys() for each in processes)
    of_counters = returned["processes"]["contains"]["counters"]["contains"]
    assert all(counter.keys() == of_counters.keys() for each in processes for counter in each["counters"])
    kinds = {(*each["backends"], each["accounting"], each["counter"], each["holder"]) for each in processes}
    assert kinds >= {
        ("iommufd", "user", "user", False),
        ("iommufd", "process", "mm_locked", False),
        ("iommufd", "none", None, False),
        ("legacy", "process", "mm_locked", False),
        ("vdpa", "process", "mm_pinned", False),
        ("iommufd", "user", None, True),
    }
    verdicts = {host["verdict"] for host in audit_report(results)["hosts"].values()}
    assert verdicts == set(HOST_VERDICTS) - {NOT_LIMITED}


def test_the_end_of_a_thousand_hosts_fits_a_screen() -> None:
    results = fleet.fleet(1000, 8)
    report = audit_report(results)
    assert report["hosts"].keys() == results.keys()
    # Every one has what it was made with, and is told of in full.
    assert {name: host["verdict"] for name, host in report["hosts"].items()} == {
        name: fleet.ailment(number) for number, name in enumerate(results)
    }
    assert set(results) <= set(report["lines"])
    assert sum(len(host["vms"]) for host in report["hosts"].values()) == 8 * 950
    end = report["end"]
    assert len(end) == _report_text.SCREEN
    assert end[:4] == [
        "1000 hosts with 7600 VMs: 10 over limit, 20 at risk, 10 may fail later,",
        "10 unknown, 10 failed, 10 unreachable, 10 not ready, 10 no iommufd, 900",
        "ok, 10 no VMs",
        "kvm0002: 8 VMs, 1 over limit: vm2-0; 5 ok; 2 not limited",
    ]
    (rest,) = [number for number, line in enumerate(end) if line.startswith("... and ")]
    assert end[rest : rest + 2] == [
        f"... and {1000 - (rest - 3)} hosts more: 19 at risk, 10 may fail later, 10 unknown, 10",
        "failed, 10 unreachable, 10 not ready, 10 no iommufd, 900 ok, 10 no VMs",
    ]
    assert end[rest + 2].startswith("160 VMs: At its next start put iommufd-exec in front of its VMM")


@pytest.mark.parametrize("results", [None, "text", [], [info()]])
def test_a_wrong_input(results: Any) -> None:
    with pytest.raises(IommufdError) as raised:
        audit_report(results)
    assert str(raised.value) == (
        "The input is not a dictionary: give it the names of hosts with what virt.iommufd.iommufd_info"
        " returned for each."
    )


def test_a_wrong_parameter_is_named() -> None:
    with pytest.raises(IommufdError) as raised:
        audit_report({}, forecast="yes")
    assert str(raised.value) == "forecast: 'yes' is neither true nor false."
