from typing import Any, Mapping
def matches(values: Mapping[str, Any], when: Mapping[str, Any]) -> bool:
    import operator
    for k, w in when.items():
        v = values.get(k)
        if isinstance(w, str) and w.startswith(">="):
            if v is None or not v >= float(w[2:]): return False
        elif v not in (w if isinstance(w, list) else [w]): return False
    return True
def check_when(when: Any, where: str) -> None: ...
