import sys

from convkernels.cli import main

sys.exit(main())
