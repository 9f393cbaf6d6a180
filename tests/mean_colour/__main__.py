"""The server with one more task: `python -m tests.mean_colour`."""

from service import served_tasks
from service.cli import main
from tests.mean_colour.task import MEAN_COLOUR

served_tasks.TASKS = (MEAN_COLOUR, *served_tasks.TASKS)
main()
