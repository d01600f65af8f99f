# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils import _report
from ansible_collections.virt.iommufd.plugins.plugin_utils._report import audit_report
from ansible_collections.virt.iommufd.tests.unit.filter_docs import documented_fields
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MIB = 1024**2
PINNED = 65792 * 1024

Row = dict[str, Any]


def process(**fields: Any) -> Row:
    """A running VM, as the module returns it; of its fields, those that matter here."""
    return {
        "pid": 4242,
        "comm": "qemu-system-x86",
        "uid": 64055,
        "user": "libvirt-qemu",
        "name": "guest1",
        "domain": "vm1",
        "unit": "machine-qemu\\x2d1\\x2dvm1.scope",
        "pinned_bytes": PINNED,
        "memlock_bytes": 100 * MIB,
        "memlock_unlimited": False,
        "accounting": "user",
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
        "host": {"limits_of_view": [], "module": "loaded", **host},
        "processes": list(processes),
        "users": [{"uid": 64055, "at_risk": at_risk}, {"uid": 1000, "at_risk": False}],
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
    assert row.keys() == fields["hosts"]["contains"].keys()
    vm = {name: field["sample"] for name, field in fields["hosts"]["contains"]["vms"]["contains"].items()}
    assert row["vms"] == [vm]
    assert audit_report({"kvm1": info(process(), at_risk=True)})["lines"] == fields["lines"]["sample"]


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
            "The result is not what this version of virt.iommufd.iommufd_info returns (KeyError('comm')).",
            id="without fields",
        ),
    ],
)
def test_a_host_that_could_not_be_looked_at(result: Any, status: str, msg: str) -> None:
    assert told(result) == {
        "status": status,
        "msg": msg,
        "limits_of_view": [],
        "vms": [],
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
            process(accounting=None, headroom_bytes=None, notes=["Its iommufds cannot be looked at."]),
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
VM    user          accounting  pinned  limit  headroom  verdict
vm1   libvirt-qemu  user         64.2M   100M     35.8M  at risk
vm2   libvirt-qemu  user         64.2M   100M    -28.5M  over limit
free  root          none         64.2M   100M         -  not limited

kvm2
VM     user          accounting  pinned  limit  headroom  verdict
large  libvirt-qemu  process        66G   none         -  not limited
vm1    libvirt-qemu  ?            64.2M   100M         -  unknown
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

kvm1: 3 VMs, 1 over limit: vm2; 1 at risk: vm1; 1 not limited
kvm2: 2 VMs, 1 unknown: vm1; 1 not limited; there may be more
kvm3: no VMs
kvm4: no iommufd in this kernel
kvm5: failed: The first line
kvm6: unreachable: Failed to connect to the host via ssh: ssh: connec..."""
    )


LONG = "a-name-that-is-far-too-long-for-any-column-of-a-table-and-for-a-line-of-text-too-in-fact"


@pytest.mark.parametrize(
    ("vm", "user", "expected"),
    [
        pytest.param("vm1", LONG, "vm1  a-name-that-is-far...  user         64.2M   100M     35.8M  ok", id="user"),
        pytest.param(LONG, "root", "a-name-that-is-fa...  root  user         64.2M   100M     35.8M  ok", id="VM"),
        pytest.param(LONG, LONG, "a-name-th...  a-name-th...  user         64.2M   100M     35.8M  ok", id="both"),
    ],
)
def test_names_make_room(vm: str, user: str, expected: str) -> None:
    lines = audit_report({"kvm1": info(process(domain=vm, user=user))})["lines"]
    assert lines[2] == expected


def test_a_host_has_one_line_at_the_end() -> None:
    lines = audit_report({LONG: info(OVER, process())})["lines"]
    assert lines[-2:] == ["", "a-name-that-is-far-too-long-for-any-c...: 2 VMs, 1 over limit: vm3; 1 ok"]


def test_a_long_name_and_a_long_summary() -> None:
    lines = audit_report({LONG: {"failed": True, "msg": "b" * 99}})["lines"]
    assert lines[-1] == f"{LONG[:33]}...: failed: {'b' * 23}..."


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
    assert lines[3].startswith(shown[:8])
    assert lines[4] == f"{shown}: {shown}"
    assert lines[-1] == f"{shown}: 2 VMs, 2 over limit: vm3, {shown}"
    assert list(report["hosts"]) == [name]
    assert report["hosts"][name]["vms"][1]["vm"] == name


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(list(process())), inner),
    max_leaves=8,
)


# A busy machine is no reason to fail.
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(),
        st.builds(
            lambda fields, host, users: {**info(process(), process(**fields)), **host, **users},
            st.dictionaries(st.sampled_from(list(process())), JUNK, max_size=3),
            st.dictionaries(st.just("host"), JUNK, max_size=1),
            st.dictionaries(st.just("users"), JUNK, max_size=1),
        )
        | JUNK,
        max_size=3,
    )
)
def test_whatever_a_host_returns(results: Row) -> None:
    report = audit_report(results)
    assert report["hosts"].keys() == results.keys()
    for line in report["lines"]:
        assert len(line) <= _report.WIDTH
        assert line.isascii()
        assert line == "" or line.isprintable()


def test_the_data_can_be_written_as_json() -> None:
    report = audit_report({"kvm1": info(process(), unlimited()), "kvm2": None})
    assert json.loads(json.dumps(report)) == report


def test_no_hosts() -> None:
    assert audit_report({}) == {"hosts": {}, "lines": []}


@pytest.mark.parametrize("results", [None, "text", [], [info()]])
def test_a_wrong_input(results: Any) -> None:
    with pytest.raises(IommufdError) as raised:
        audit_report(results)
    assert str(raised.value) == (
        "The input is not a dictionary: give it the names of hosts with what virt.iommufd.iommufd_info"
        " returned for each."
    )
