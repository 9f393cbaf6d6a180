"""The server with one more task: `python -m tests.mean_colour`."""

import sys

from service import computed_tasks, served_tasks
from service.cli import main
from service.processes import birth
from tests.mean_colour.task import MEAN_COLOUR

computed_tasks.TASKS = (MEAN_COLOUR, *computed_tasks.TASKS)
served_tasks.TASKS = (MEAN_COLOUR.served, *served_tasks.TASKS)
birth.COMMAND = (sys.executable, "-m", "tests.mean_colour", "child")
main()
