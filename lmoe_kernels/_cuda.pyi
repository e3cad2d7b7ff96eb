# csrc/bindings.cpp: the fields of csrc/params.h, with addresses as ints (0 is null), and the launchers.

class ForwardParams:
    smem: int
    def set_problem(
        self,
        dtype: int,
        T: int,
        I: int,
        O: int,
        E: int,
        R: int,
        experts_of_a: int,
        top_k: int,
        renormalize: bool,
        scaling: float,
        factors: bool,
        x: int,
        x_stride: int,
        lora_a: int,
        lora_a_fp32: bool,
        lora_b: int,
        lora_b_fp32: bool,
        gate_weight: int,
        gate_weight_fp32: bool,
        logits: int,
        logits_fp32: bool,
        base: int,
        base_stride: int,
        u: int,
        y: int,
        /,
    ) -> None: ...
    def set_workspaces(
        self, v: int, v_stride: int, scratch: int, scratch_stride: int, partial: int, shrink_parts: int, /
    ) -> None: ...

class BackwardParams(ForwardParams):
    dy: int
    dy_stride: int
    dlogits_in: int
    dv: int
    z: int
    z_stride: int
    wgrad_splits: int
    dx: int
    dlora_a: int
    dlora_b: int
    dgate_weight: int
    dlogits: int

class DecodeParams(ForwardParams):
    def set_plan(self, partial: int, blocks: int, chunk: int, chunks: int, column_tile: int, smem: int, /) -> None: ...

def forward(params: ForwardParams, device: int, stream: int) -> None: ...
def backward(params: BackwardParams, device: int, stream: int) -> None: ...
def decode(params: DecodeParams, device: int, stream: int) -> None: ...
def processors(device: int) -> int: ...
