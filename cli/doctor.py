"""`kprobe doctor`."""
import typer
app = typer.Typer()
@app.command()
def doctor(json: bool = typer.Option(False, "--json")) -> None:
    """x"""
    print("hi", json)
