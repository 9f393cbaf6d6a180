"""The server with one more task: `python -m tests.mean_colour`."""

from service import computed_tasks, served_tasks
from service.cli import main
from tests.mean_colour.task import MEAN_COLOUR

computed_tasks.TASKS = (MEAN_COLOUR, *computed_tasks.TASKS)
served_tasks.TASKS = (MEAN_COLOUR.served, *served_tasks.TASKS)
main()
