"""What the router process must never hold."""

import subprocess
import sys


def test_the_router_imports_no_torch_and_nothing_of_the_engine() -> None:
    code = (
        "import sys, router.process, services.protocol.client\n"
        "bad = {'torch', 'transformers', 'triton', 'numpy', 'nixl_cu13', 'services.worker'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
