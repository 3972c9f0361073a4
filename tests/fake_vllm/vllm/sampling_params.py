"""As much of the module as the worker imports."""


class RequestOutputKind:
    FINAL_ONLY = "final only"
