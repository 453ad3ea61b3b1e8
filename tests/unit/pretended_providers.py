"""ONNX Runtime that pretends to have GPU providers; the CPU answers."""

import onnxruntime  # noqa: TID253 (is patched)

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
ALL = (TENSORRT, CUDA, CPU)


class Pretended:
    """What was asked of it: for each session its providers with their options."""

    def __init__(self, monkeypatch, *, available=ALL, runs_on=None, fails=None):
        """`runs_on`: what sessions fall back to; `fails`: with what their making ends."""
        self.asked = asked = []

        class Session(onnxruntime.InferenceSession):
            def __init__(self, content, options, *, providers, enable_fallback):
                assert not enable_fallback
                names = [name for name, _ in providers]
                asked.append(providers)
                if fails is not None and names != [CPU]:
                    raise fails
                self.pretended = list(runs_on or names)
                super().__init__(content, options, providers=[CPU], enable_fallback=0)

            def get_providers(self):
                return self.pretended

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(available))
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
