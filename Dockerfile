# The code in /home/code on PyTorch's official CUDA image; the data is mounted at /home/data by setup-docker.sh.
ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

# The requirements first: a change of the code leaves this layer as it is. torch and torchvision are the image's own.
COPY requirements.txt /home/requirements.txt
RUN pip install --no-cache-dir -r /home/requirements.txt

COPY code /home/code
WORKDIR /home/code

ENTRYPOINT ["python3", "cli.py"]
CMD ["train"]
