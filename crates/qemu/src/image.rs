//! Disk images as files: made and looked at with `qemu-img`.
//!
//! **Invariant.** The format is always said, never guessed from the content: a
//! guest that writes a qcow2 header into its raw disk must not make the host
//! open what that header names.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

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
    #[error("{words}")]
    Refused {
        /// Its own words
        words: String,
    },
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
}

async fn run(tool: &Path, command: &mut Command) -> Result<Vec<u8>, ImageError> {
    let at = |source| ImageError::Start { tool: tool.to_owned(), source };
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(at)?;
    let output = tokio::time::timeout(TOOL_MAX, child.wait_with_output())
        .await
        .map_err(|_| ImageError::Silent)?
        .map_err(at)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let words = String::from_utf8_lossy(&output.stderr);
        let words = words.trim().trim_start_matches("qemu-img: ").chars().take(500).collect();
        Err(ImageError::Refused { words })
    }
}

/// Makes an empty image.
///
/// # Errors
/// [`ImageError`].
pub async fn image_create(
    tool: &Path,
    path: &Path,
    format: ImageFormat,
    size_bytes: u64,
) -> Result<(), ImageError> {
    let mut command = Command::new(tool);
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
    tool: &Path,
    path: &Path,
    format: ImageFormat,
) -> Result<ImageFacts, ImageError> {
    let mut command = Command::new(tool);
    command.args(["info", "-U", "--output=json", "-f", format.as_str(), "--"]).arg(path);
    let text = run(tool, &mut command).await?;
    let answer: Answer = serde_json::from_slice(&text).map_err(ImageError::Answer)?;
    Ok(ImageFacts {
        virtual_size: answer.virtual_size,
        actual_size: answer.actual_size,
        backing: answer.backing,
    })
}

/// Reads the content that a guest sees: the caller reads it from the child.
///
/// # Errors
/// [`ImageError::Start`].
pub fn read_content(
    tool: &Path,
    path: &Path,
    format: ImageFormat,
) -> Result<tokio::process::Child, ImageError> {
    // `dd` writes to a file only; a pipe behind /dev/stdout is one to it.
    Command::new(tool)
        .args(["dd", "-U", "-f", format.as_str(), "-O", "raw", "bs=1M"])
        .arg(format!("if={}", path.display()))
        .arg("of=/dev/stdout")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| ImageError::Start { tool: tool.to_owned(), source })
}
