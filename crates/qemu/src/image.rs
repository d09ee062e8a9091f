//! Disk images as files: made and looked at with `qemu-img`.
//!
//! **Invariants.** The format is always said, never guessed from the content: a
//! guest that writes a qcow2 header into its raw disk must not make the host
//! open what that header names. An image may come from a stranger: the tool runs
//! with limits, as QEMU's user where the agent is root, and its answers are read
//! up to a limit. Paths begin at the root,
//! because QEMU takes `nbd:host:port` for another kind of name.

use std::fs::File;
use std::io::{Read, Seek};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::process::{self, User};

/// Most address space that the tool may take, in bytes.
const ADDRESS_SPACE_BYTES_MAX: u64 = 2 << 30;
/// Most bytes of an answer, or of a complaint, that are read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Bytes of content that are taken out of an image at once.
const CONTENT_STEP_BYTES: u64 = 64 << 20;
/// Bytes of content that wait for their reader.
const CONTENT_QUEUE_BYTES: usize = 1 << 20;
/// Longest a look at, or the making of, an image may take.
const TOOL_MAX: Duration = Duration::from_secs(60);

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes as they are
    Raw,
    /// QEMU's copy-on-write format
    Qcow2,
}

impl ImageFormat {
    /// QEMU's name for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFacts {
    /// Bytes that the guest sees
    pub virtual_size: u64,
    /// Bytes that the file uses
    pub actual_size: u64,
    /// Image on which it stands
    pub backing: Option<String>,
    /// Snapshots that it keeps inside
    pub snapshots: Vec<String>,
    /// Dirty bitmaps that it keeps inside
    pub bitmaps: Vec<String>,
}

/// The image tool.
#[derive(Debug, Clone)]
pub struct ImageTool {
    /// The program
    pub program: PathBuf,
    /// As whom it runs; `None` as the agent does
    pub user: Option<User>,
}

/// Why the image tool gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It did not start.
    #[error("cannot start {}", tool.display())]
    Start {
        /// The program
        tool: PathBuf,
        /// Why
        #[source]
        source: std::io::Error,
    },
    /// It refused.
    #[error("{stderr_text}")]
    Refused {
        /// Its own stderr_text
        stderr_text: String,
    },
    /// The image lies where the tool's user may not go.
    #[error("QEMU's user may not open it: {stderr_text}")]
    Closed {
        /// The tool's own stderr_text
        stderr_text: String,
    },
    /// The path does not begin at the root.
    #[error("the path {} does not begin with /", path.display())]
    Relative {
        /// The path
        path: PathBuf,
    },
    /// The image keeps its content in another file, which Limosa does not move.
    #[error("the image keeps its content in another file, {name}")]
    DataFile {
        /// Name of the other file
        name: String,
    },
    /// Its answer is too long.
    #[error("an answer of more than {ANSWER_BYTES_MAX} bytes")]
    TooLong,
    /// It took too long.
    #[error("no answer within {} s", TOOL_MAX.as_secs())]
    Silent,
    /// Its answer is not understood.
    #[error("an answer that is not understood")]
    Answer(#[source] serde_json::Error),
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
    #[serde(rename = "actual-size", default)]
    actual_size: u64,
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
    #[serde(default)]
    snapshots: Vec<Named>,
    #[serde(rename = "format-specific")]
    specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Specific {
    #[serde(default, rename = "data")]
    qcow2: Qcow2,
}

#[derive(Default, Deserialize)]
struct Qcow2 {
    #[serde(rename = "data-file")]
    data_file: Option<String>,
    #[serde(default)]
    bitmaps: Vec<Named>,
}

fn check_path(path: &Path) -> Result<(), ImageError> {
    if path.is_absolute() { Ok(()) } else { Err(ImageError::Relative { path: path.to_owned() }) }
}

fn limited(tool: &ImageTool) -> Command {
    let mut command = Command::new(&tool.program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir("/")
        .kill_on_drop(true);
    let limits = || {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let to = |most| Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(Resource::As, to(ADDRESS_SPACE_BYTES_MAX))?;
        setrlimit(Resource::Core, to(0))?;
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made; nothing allocates,
    // locks or unwinds.
    unsafe { command.pre_exec(limits) };
    process::run_as(&mut command, tool.user.as_ref());
    command
}

async fn run(tool: &ImageTool, command: &mut Command) -> Result<Vec<u8>, ImageError> {
    let at = |source| ImageError::Start { tool: tool.program.clone(), source };
    let mut child = command.spawn().map_err(at)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let work = async {
        // Both at once: a child that waits to be read on one never ends the other.
        let (answer, stderr_bytes) = tokio::join!(read_limited(stdout), read_limited(stderr));
        Ok::<_, std::io::Error>((answer?, stderr_bytes?, child.wait().await?))
    };
    let (answer, stderr_bytes, status) =
        tokio::time::timeout(TOOL_MAX, work).await.map_err(|_| ImageError::Silent)?.map_err(at)?;
    if !status.success() {
        return Err(refused(&stderr_bytes));
    }
    if u64::try_from(answer.len()).unwrap_or(u64::MAX) > ANSWER_BYTES_MAX {
        return Err(ImageError::TooLong);
    }
    Ok(answer)
}

/// Reads one byte more than allowed, so that too long an answer shows.
async fn read_limited(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(ANSWER_BYTES_MAX + 1).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

fn refused(stderr_bytes: &[u8]) -> ImageError {
    let stderr_text = String::from_utf8_lossy(stderr_bytes);
    let stderr_text: String =
        stderr_text.trim().trim_start_matches("qemu-img: ").chars().take(500).collect();
    if stderr_text.ends_with("Permission denied") {
        ImageError::Closed { stderr_text }
    } else {
        ImageError::Refused { stderr_text }
    }
}

/// Makes an empty image.
///
/// # Errors
/// [`ImageError`].
pub async fn image_create(
    tool: &ImageTool,
    path: &Path,
    format: ImageFormat,
    size_bytes: u64,
) -> Result<(), ImageError> {
    check_path(path)?;
    let mut command = limited(tool);
    command
        .args(["create", "-q", "-f", format.as_str(), "--"])
        .arg(path)
        .arg(size_bytes.to_string());
    run(tool, &mut command).await.map(drop)
}

/// Looks at an image, also while a QEMU uses it.
///
/// # Errors
/// [`ImageError`].
pub async fn image_facts(
    tool: &ImageTool,
    path: &Path,
    format: ImageFormat,
) -> Result<ImageFacts, ImageError> {
    check_path(path)?;
    let mut command = limited(tool);
    command.args(["info", "-U", "--output=json", "-f", format.as_str(), "--"]).arg(path);
    let text = run(tool, &mut command).await?;
    let answer: Answer = serde_json::from_slice(&text).map_err(ImageError::Answer)?;
    let qcow2 = answer.specific.map(|specific| specific.qcow2).unwrap_or_default();
    if let Some(name) = qcow2.data_file {
        return Err(ImageError::DataFile { name });
    }
    let names = |all: Vec<Named>| all.into_iter().map(|one| one.name).collect();
    Ok(ImageFacts {
        virtual_size: answer.virtual_size,
        actual_size: answer.actual_size,
        backing: answer.backing,
        snapshots: names(answer.snapshots),
        bitmaps: names(qcow2.bitmaps),
    })
}

/// What a guest sees on a disk, read from its image.
#[derive(Debug)]
pub struct Content {
    /// The bytes, in order; to be read to their end before [`Content::wait`].
    pub stdout: Option<tokio::io::DuplexStream>,
    reader: tokio::task::JoinHandle<Result<ExitStatus, std::io::Error>>,
}

impl Content {
    /// How reading went: only after success were the bytes all of the content.
    ///
    /// # Errors
    /// What the system said.
    pub async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        (&mut self.reader).await.map_err(std::io::Error::other)?
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Reads a range of the content that a guest sees, also while a QEMU holds the
/// image. It ends with the disk, if not before.
///
/// The tool writes only to files that it can seek in, so it fills a piece of
/// memory, a step at a time, and the memory is read from here.
///
/// # Errors
/// [`ImageError`].
pub fn read_content(
    tool: &ImageTool,
    path: &Path,
    format: ImageFormat,
    range: Range<u64>,
) -> Result<Content, ImageError> {
    check_path(path)?;
    let at = |source| ImageError::Start { tool: tool.program.clone(), source };
    let memory = rustix::fs::memfd_create("limosa-content", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| at(error.into()))?;
    let mut memory = File::from(memory);
    let (mut sink, stdout) = tokio::io::duplex(CONTENT_QUEUE_BYTES);
    let (tool, path) = (tool.clone(), path.to_owned());
    let reader = tokio::spawn(async move {
        let facts = image_facts(&tool, &path, format).await.map_err(std::io::Error::other)?;
        let mut status = ExitStatus::default();
        let mut buffer = vec![0; CONTENT_QUEUE_BYTES];
        let end = range.end.min(facts.virtual_size);
        let mut offset = range.start;
        while offset < end && status.success() {
            let size = CONTENT_STEP_BYTES.min(end - offset);
            memory.set_len(0)?;
            let window = Window { path: &path, format, range: offset..offset + size };
            status = copy_window(&tool, &window, &memory).await?;
            memory.rewind()?;
            let mut left = size;
            while left > 0 && status.success() {
                // From memory, so it does not wait.
                let count = memory.read(&mut buffer)?;
                if count == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                sink.write_all(&buffer[..count]).await?;
                left = left.saturating_sub(u64::try_from(count).unwrap_or(left));
            }
            offset += size;
        }
        Ok(status)
    });
    Ok(Content { stdout: Some(stdout), reader })
}

/// A range of an image's content.
struct Window<'a> {
    path: &'a Path,
    format: ImageFormat,
    range: Range<u64>,
}

/// Fills `memory` with the bytes of a window.
///
/// The window is described to QEMU as a node: the tool's `dd` counts `count` from the
/// start of the image up to 10.0, and not from `skip`.
async fn copy_window(
    tool: &ImageTool,
    window: &Window<'_>,
    memory: &File,
) -> std::io::Result<ExitStatus> {
    let window = serde_json::json!({
        "driver": "raw",
        "offset": window.range.start,
        "size": window.range.end - window.range.start,
        "file": {
            "driver": window.format.as_str(),
            "file": { "driver": "file", "filename": window.path },
        },
    });
    limited(tool)
        .args(["convert", "-U", "-O", "raw"])
        .arg(format!("json:{window}"))
        // By its own descriptor: the agent's are closed to another user.
        .arg("/proc/self/fd/1")
        .stdout(memory.try_clone()?)
        .stderr(Stdio::null())
        .status()
        .await
}
