"""`python -m service` is `dat-serve`."""

from service.cli import main

if __name__ == "__main__":
    main()
