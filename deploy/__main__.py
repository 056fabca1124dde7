"""`python -m deploy` is `baton`, wherever the console script is not on the path."""

from deploy.cli import main

if __name__ == "__main__":
    main()
