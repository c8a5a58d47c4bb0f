import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

def test_readme_is_what_the_first_notebook_says():
    done = subprocess.run([sys.executable, "docs/build.py", "--check-readme"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
