"""`nox` runs the modules' tests on several versions of transformers; `nox -s "modules(5.18.0)"` on one."""

import nox

nox.options.default_venv_backend = "venv"
OLDEST, BEFORE, NEWEST = "5.18.0", "5.23.0", "5.24.0"  # the oldest is the bound of requirements.txt


@nox.session(python="3.11")
@nox.parametrize("transformers", [OLDEST, BEFORE, NEWEST], ids=[OLDEST, BEFORE, NEWEST])
def modules(session, transformers):
    session.install(
        "torch==2.13.0", f"transformers=={transformers}", "-r", "requirements.txt", "-r", "tests/requirements.txt"
    )
    session.install("--no-deps", "--editable", ".")
    session.run("pytest", "-m", "not full_size and not slow", "@tests/modules.txt", *session.posargs)
