"""Where torch finds this copy of the package's operators. A copy that may meet another in one process has another."""

NAMESPACE = "convkernels"
