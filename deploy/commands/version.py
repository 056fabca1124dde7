"""`baton version`."""

from importlib.metadata import PackageNotFoundError, version

from deploy.settings.options import VersionSettings


def run(settings: VersionSettings) -> None:
    try:
        print(version("baton"))
    except PackageNotFoundError:
        print("unknown (not installed as a package)")
