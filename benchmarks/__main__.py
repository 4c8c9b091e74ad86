import sys

from benchmarks import cores

if __name__ == "__main__":
    cores.bind()
    from benchmarks.cli import main

    sys.exit(main())
