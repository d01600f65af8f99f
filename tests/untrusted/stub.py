# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stands for a module, in tests: WANT_JSON has Ansible give the options in a file. It changes nothing.

It keeps what it was asked for in a file beside its answers, one run a line.
"""

import json
import sys

NAME = "@NAME@"
ANSWERS = "@ANSWERS@"


def main() -> None:
    with open(ANSWERS) as stream:
        answers = json.load(stream)
    with open(sys.argv[1]) as stream:
        options = json.load(stream)
    with open(f"{ANSWERS}.asked", "a") as stream:
        stream.write(json.dumps([NAME, options]) + "\n")
    answer = answers.get(NAME, answers["done"])
    # One row for whatever is asked for.
    for kind, row in answer.pop("each", {}).items():
        answer[kind] = dict.fromkeys(options.get(kind) or [], row)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
