"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder made by distill or teacher train.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable."),
]
MovedDataOption = Annotated[
    str | None, typer.Option("--data", help="Where the data lies now, if not where it was.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN", help="Folder of the run [default: runs/NAME-ID]."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="Format of training: auto, float32 or bfloat16.")
]
CompileOption = Annotated[
    str,
    typer.Option("--compile", help="Networks: auto (long runs on CPUs with AMX), on or off."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads [default: all cores].")
]
ProviderOption = Annotated[
    str,
    typer.Option("--provider", help="Of ONNX Runtime, for ONNX files: cpu, cuda or tensorrt."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MemoryOption = Annotated[
    int,
    typer.Option("--memory-mib", min=1, help="Data sets larger than this are streamed from disk."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="That decode, for each of --nproc [default: share the cores]."
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue a run that was interrupted.")
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Let torchvision fetch a data set that is not there.")
]
AcceptOption = Annotated[
    bool,
    typer.Option(
        "--accept-teachers", help="Go on with a teacher that is at chance level or not robust."
    ),
]
CheckpointOption = Annotated[
    float,
    typer.Option("--checkpoint-minutes", min=0.01, help="Save also within an epoch, this often."),
]
KeepOption = Annotated[
    int | None,
    typer.Option("--keep-every", min=1, help="Keep the checkpoint of every such epoch."),
]
ProcessesOption = Annotated[
    int,
    typer.Option("--nproc", min=1, max=1024, help="Processes of this machine that share the work."),
]
RestartsOption = Annotated[
    int,
    typer.Option(min=0, help="How often killed processes of --nproc begin anew, at a checkpoint."),
]
