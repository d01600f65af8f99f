# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the filters add to the functions that they are made of, which are tested in plugin_utils."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.virt.iommufd.plugins.filter import (
    _host_kept,
    _host_plan,
    _host_result,
    audit_report,
    memlock_fit,
    memlock_forecast,
)
from ansible_collections.virt.iommufd.plugins.module_utils._errors import IommufdError
from ansible_collections.virt.iommufd.plugins.plugin_utils import _filters

INTERNAL = [("_host_kept", _host_kept), ("_host_plan", _host_plan), ("_host_result", _host_result)]
PUBLIC = [("audit_report", audit_report), ("memlock_fit", memlock_fit), ("memlock_forecast", memlock_forecast)]


@pytest.mark.parametrize(("name", "plugin"), INTERNAL + PUBLIC)
def test_a_filter_goes_by_its_name(name: str, plugin: ModuleType) -> None:
    assert list(plugin.FilterModule().filters()) == [name]
    assert yaml.safe_load(plugin.DOCUMENTATION)["name"] == name


@pytest.mark.parametrize(("name", "plugin"), INTERNAL + PUBLIC)
def test_the_documented_parameters(name: str, plugin: ModuleType) -> None:
    function = plugin.FilterModule().filters()[name].__wrapped__
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    options = yaml.safe_load(plugin.DOCUMENTATION)["options"]
    assert sorted(names) == sorted(set(options) - {"_input"})
    defaults = function.__defaults__ or ()
    given = dict(zip(names[len(names) - len(defaults) :], defaults))
    assert {name: options[name].get("default") for name in given} == given
    assert {name for name in names if options[name].get("required")} == set(names) - given.keys()


@pytest.mark.parametrize(("name", "plugin"), INTERNAL)
def test_what_is_internal_says_so(name: str, plugin: ModuleType) -> None:
    documented = yaml.safe_load(plugin.DOCUMENTATION)
    assert documented["short_description"].startswith("[INTERNAL] ")
    assert documented["description"][0].startswith("Do not use this filter. Only the role")


def message(name: str, *given: Any, **parameters: Any) -> str:
    """What a filter tells of an error."""
    run = dict(INTERNAL + PUBLIC)[name].FilterModule().filters()[name]
    with pytest.raises(AnsibleFilterError) as raised:
        run(*given, **parameters)
    return str(raised.value)


def test_what_filters_are_given() -> None:
    """Nothing but what has the right type, so what is told is the first that they look for."""
    missing = "{}: There is no {!r} in its input."
    assert message("_host_plan", {}, config={}, check={}) == missing.format("_host_plan", "host")
    rest: dict[str, Any] = {"info": {}, "applied": {}, "check": {}, "restarts": True}
    assert message("_host_result", {}, **rest) == missing.format("_host_result", "state")
    assert message("_host_kept", {}, applied={}, check={}) == missing.format("_host_kept", "wanted")
    assert message("audit_report", []).startswith("audit_report: The input is not a dictionary: ")
    assert message("memlock_forecast", {}).startswith("memlock_forecast: The input is not what ")
    assert message("memlock_fit", {}, memory="64M", user="vm").startswith("memlock_fit: The input is not what ")


def test_arguments_answers_and_errors_pass() -> None:
    def function(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("wrong"):
            raise kwargs["wrong"]
        return args, kwargs

    run = _filters.reporting("name", function)
    assert run(1, 2, three=3) == ((1, 2), {"three": 3})
    with pytest.raises(AnsibleFilterError) as raised:
        run(wrong=IommufdError("It is wrong."))
    assert str(raised.value) == "name: It is wrong."
    # What nobody has thought of is not made to look as if somebody had.
    with pytest.raises(ZeroDivisionError):
        run(wrong=ZeroDivisionError())
